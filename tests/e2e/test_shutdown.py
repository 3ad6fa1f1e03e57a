"""A server that is killed in the middle of a request leaves nothing; the other endings are those of other tests."""

import pytest

from examples.vllm_server import VllmServer
from tests.e2e.conftest import START_TIMEOUT_S
from tests.e2e.endings import end_amid_a_request

pytestmark = pytest.mark.e2e

SLOW = {"prompt": "a", "size": "512x512", "num_inference_steps": 200, "true_cfg_scale": 4, "negative_prompt": ""}


@pytest.mark.parametrize("ending", ["kill -9 of the API server", "kill -9 of EngineCore"])
def test_nothing_is_left_behind(model, tmp_path, ending):
    with VllmServer(model, ["--cfg-parallel-size", "2"], tmp_path / "server.log") as server:
        server.wait_ready(START_TIMEOUT_S)
        end_amid_a_request(server, ending, json=SLOW)
