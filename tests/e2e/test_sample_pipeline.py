"""The documentation's sample pipeline in the real engine, with the line in the registry that the page tells to add."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.custom_pipeline.aura_flow import AuraFlowPipeline
from tests.model_builders.aura_flow import build_aura_flow

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
# The engine's processes are forked, so they have the line too.
SCRIPT = """
import sys
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams
from vllm_cfg_plugin.pipelines.registry import FAMILIES

FAMILIES["AuraFlowPipeline"] = "examples.custom_pipeline.aura_flow:AuraFlowPipeline"
params = [DiffusionParams(guidance_scale=scale, seed=5, num_inference_steps=4) for scale in (3.0, 1.0, 5.0)]
with DiffusionLLM(sys.argv[1], cfg_parallel_size=2) as llm:
    for index, output in enumerate(llm.generate(["a red apple"] * len(params), params, use_tqdm=False)):
        assert not output.error, output.error
        assert output.metrics.guided == (index != 1)
        output.images[0].save(f"{index}.png")
"""


def test_images_of_the_engine_are_those_of_a_direct_call(tmp_path):
    model = build_aura_flow(tmp_path / "model")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    command = [sys.executable, "-c", SCRIPT, str(model)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    pipeline = AuraFlowPipeline.load(str(model), dtype=torch.float32, device=torch.device("cpu"))
    for index, scale in enumerate((3.0, 1.0, 5.0)):
        generator = torch.Generator().manual_seed(5)
        options = {"guidance_scale": scale, "num_inference_steps": 4, "height": 32, "width": 32}
        (expected,) = pipeline("a red apple", **options, generator=generator).images
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"{index}.png")), np.asarray(expected))
