"""The documentation's sample pipeline, installed as a package of its own, behind the stock `vllm serve`."""

import base64
import io
import os

import numpy as np
import pytest
import torch
from openai import OpenAI
from PIL import Image

from examples.custom_pipeline.aura_flow import AuraFlowPipeline
from examples.vllm_server import VllmServer
from tests.e2e.conftest import START_TIMEOUT_S
from tests.model_builders.aura_flow import build_aura_flow
from tests.packages import install_sample

pytestmark = pytest.mark.e2e


def test_images_of_the_server_are_those_of_a_direct_call(tmp_path):
    model = build_aura_flow(tmp_path / "model")
    path = os.pathsep.join([str(install_sample(tmp_path / "site")), os.environ.get("PYTHONPATH", "")])
    options = ["--cfg-parallel-size", "2", "--served-model-name", "sample"]
    pipeline = AuraFlowPipeline.load(str(model), dtype=torch.float32, device=torch.device("cpu"))
    with VllmServer(model, options, tmp_path / "server.log", {"PYTHONPATH": path}) as server:
        server.wait_ready(START_TIMEOUT_S)
        client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)
        for scale in (3.0, 1.0, 5.0):
            asked = {"guidance_scale": scale, "num_inference_steps": 4}
            extra = {"seed": 5, "output_format": "png", **asked}
            answer = client.images.generate(model="sample", prompt="a red apple", size="32x32", extra_body=extra)
            (image,) = answer.data
            assert image.metrics["guided"] == (scale > 1)
            generator = torch.Generator().manual_seed(5)
            (expected,) = pipeline("a red apple", **asked, height=32, width=32, generator=generator).images
            served = Image.open(io.BytesIO(base64.b64decode(image.b64_json)))
            np.testing.assert_array_equal(np.asarray(served), np.asarray(expected))
