"""The shortest way through everything, for the other release of vLLM: `make smoke VLLM=0.32.0`."""

import os

import numpy as np
import pytest
import requests

from tests.e2e.test_serve import client, generate, pixels, server  # noqa: F401  (fixtures)
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

pytestmark = pytest.mark.e2e

STEPS = {"num_inference_steps": 3, "true_cfg_scale": 3.0, "negative_prompt": ""}


def test_serve_and_generate_draw_the_same_image(client, model):  # noqa: F811
    (served,) = generate(client, **STEPS).data
    with DiffusionLLM(str(model), cfg_parallel_size=1) as llm:
        (offline,) = llm.generate("a house", DiffusionParams(height=64, width=64, seed=11, **STEPS), use_tqdm=False)
    assert offline.error is None
    assert np.array_equal(pixels(served), np.asarray(offline.images[0]))


def test_the_server_is_the_release_that_was_asked_for(server):  # noqa: F811
    version = requests.get(f"{server.url}/version", timeout=10).json()["version"]
    assert version == os.environ.get("VLLM", version)
