"""One real `vllm serve --cfg-parallel-size 2` for all tests that leave it as they found it."""

from pathlib import Path

import pytest
from openai import OpenAI

from examples.vllm_server import VllmServer
from tests.model_builders.qwen_image import build_qwen_image

START_TIMEOUT_S = 180
SERVED_NAMES = ("tiny", "alias")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A random-weight Qwen-Image."""
    return build_qwen_image(tmp_path_factory.mktemp("model") / "tiny", size="tiny", seed=0)


@pytest.fixture(scope="session")
def server(model, tmp_path_factory):
    options = ["--cfg-parallel-size", "2", "--served-model-name", *SERVED_NAMES]
    with VllmServer(model, options, tmp_path_factory.mktemp("server") / "server.log") as server:
        server.wait_ready(START_TIMEOUT_S)
        yield server


@pytest.fixture(scope="session")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        yield client
