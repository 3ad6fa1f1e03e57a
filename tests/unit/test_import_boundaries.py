"""Modules that promise not to import something keep the promise, checked in a fresh interpreter each."""

import subprocess
import sys

import pytest

HEAVY = ("vllm", "torch", "diffusers", "transformers")
BOUNDARIES = {
    "vllm_cfg_plugin": HEAVY,
    "vllm_cfg_plugin.plugin": HEAVY,
    "vllm_cfg_plugin.errors": HEAVY,
    "vllm_cfg_plugin.params": HEAVY,
    "vllm_cfg_plugin.checkpoint": HEAVY,
    "vllm_cfg_plugin.config": HEAVY,
    "vllm_cfg_plugin.cli": HEAVY,
    "vllm_cfg_plugin.pipelines.registry": HEAVY,
    "vllm_cfg_plugin.engine.plan": HEAVY,
    "vllm_cfg_plugin.engine.planner": HEAVY,
    "vllm_cfg_plugin.engine.progress": HEAVY,
    "vllm_cfg_plugin.engine.step_result": HEAVY,
    "vllm_cfg_plugin.engine.request": ("vllm",),
    "vllm_cfg_plugin.engine.batching": ("vllm",),
    "vllm_cfg_plugin.engine.result": ("vllm",),
    "vllm_cfg_plugin.worker.channel": HEAVY,
    "vllm_cfg_plugin.worker.lifeline": HEAVY,
    "vllm_cfg_plugin.worker.state": ("vllm",),
    "vllm_cfg_plugin.worker.exchange": ("vllm",),
    "vllm_cfg_plugin.worker.packing": ("vllm",),
    "vllm_cfg_plugin.guidance": ("vllm",),
}


@pytest.mark.parametrize("module", BOUNDARIES)
def test_module_does_not_import(module):
    script = f"import sys, {module}; print(*[name for name in {BOUNDARIES[module]!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
