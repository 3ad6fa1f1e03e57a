"""Modules that promise not to import something keep the promise, checked in a fresh interpreter."""

import subprocess
import sys

import pytest

HEAVY = ("vllm", "torch", "diffusers", "transformers")
PURE = (
    "vllm_cfg_plugin",
    "vllm_cfg_plugin.plugin",
    "vllm_cfg_plugin.errors",
    "vllm_cfg_plugin.params",
    "vllm_cfg_plugin.checkpoint",
    "vllm_cfg_plugin.config",
    "vllm_cfg_plugin.cli",
    "vllm_cfg_plugin.tokens",
    "vllm_cfg_plugin.field_checks",
    "vllm_cfg_plugin.resolve",
    "vllm_cfg_plugin.lora_field",
    "vllm_cfg_plugin.pipelines.adapter_files",
    "vllm_cfg_plugin.pipelines.registry",
    "vllm_cfg_plugin.engine.admission",
    "vllm_cfg_plugin.engine.batching",
    "vllm_cfg_plugin.engine.calibration",
    "vllm_cfg_plugin.engine.cost",
    "vllm_cfg_plugin.engine.metrics",
    "vllm_cfg_plugin.engine.placement",
    "vllm_cfg_plugin.engine.plan",
    "vllm_cfg_plugin.engine.planner",
    "vllm_cfg_plugin.engine.prediction",
    "vllm_cfg_plugin.engine.progress",
    "vllm_cfg_plugin.engine.stats",
    "vllm_cfg_plugin.engine.trace",
    "vllm_cfg_plugin.engine.step_result",
    "vllm_cfg_plugin.entrypoints.fields",
    "vllm_cfg_plugin.entrypoints.forms",
    "vllm_cfg_plugin.entrypoints.images.inputs",
    "vllm_cfg_plugin.entrypoints.input_budget",
    "vllm_cfg_plugin.entrypoints.progress_bar",
    "vllm_cfg_plugin.entrypoints.images.schema",
    "vllm_cfg_plugin.entrypoints.output",
    "vllm_cfg_plugin.entrypoints.videos.file",
    "vllm_cfg_plugin.entrypoints.videos.jobs",
    "vllm_cfg_plugin.executor.channel",
    "vllm_cfg_plugin.executor.lifeline",
)
WITHOUT_VLLM = (
    "vllm_cfg_plugin.distributed.shared_memory",
    "vllm_cfg_plugin.guidance",
    "vllm_cfg_plugin.engine.result",
    "vllm_cfg_plugin.worker.calibration",
    "vllm_cfg_plugin.worker.exchange",
    "vllm_cfg_plugin.pipelines.common.cpu_kernels",
    "vllm_cfg_plugin.pipelines.common.packing",
    "vllm_cfg_plugin.worker.adapters",
    "vllm_cfg_plugin.worker.state",
    "vllm_cfg_plugin.pipelines.base",
    "vllm_cfg_plugin.worker.runner",
    "vllm_cfg_plugin.worker.side_work",
    "vllm_cfg_plugin.worker.stopwatch",
)


@pytest.mark.parametrize(("modules", "forbidden"), [(PURE, HEAVY), (WITHOUT_VLLM, ("vllm",))])
def test_modules_do_not_import(modules, forbidden):
    """Prints each module after which something forbidden is loaded; the first one is to blame."""
    script = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
    loaded = [name for name in {forbidden!r} if name in sys.modules]
    if loaded:
        sys.exit(f"{{module}} imports {{loaded}}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
