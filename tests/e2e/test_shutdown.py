"""However a server ends, in the middle of a request: no processes, sockets or shared memory are left."""

import signal
import threading
from collections.abc import Callable

import pytest
import requests

from examples.vllm_server import VllmServer
from tests.e2e.conftest import START_TIMEOUT_S
from tests.e2e.server import Footprint, engine_core, wait_for_running

pytestmark = pytest.mark.e2e

ENDINGS: dict[str, Callable[[VllmServer], None]] = {
    "SIGTERM": lambda server: server.process.send_signal(signal.SIGTERM),
    "SIGINT": lambda server: server.process.send_signal(signal.SIGINT),
    "kill -9 of the API server": lambda server: server.process.kill(),
    "kill -9 of EngineCore": lambda server: engine_core(server).kill(),
}


def send_a_slow_request(server: VllmServer, answers: list[int]) -> None:
    body = {"prompt": "a", "size": "512x512", "num_inference_steps": 200, "true_cfg_scale": 4, "negative_prompt": ""}
    try:
        answers.append(requests.post(f"{server.url}/v1/images/generations", json=body, timeout=120).status_code)
    except requests.ConnectionError:  # of a server that was killed
        answers.append(0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left_behind(model, tmp_path, ending):
    answers: list[int] = []
    with VllmServer(model, ["--cfg-parallel-size", "2"], tmp_path / "server.log") as server:
        server.wait_ready(START_TIMEOUT_S)
        client = threading.Thread(target=send_a_slow_request, args=(server, answers))
        client.start()
        wait_for_running(server, 1, timeout_s=20)
        footprint = Footprint.of(server)
        ENDINGS[ending](server)
        server.process.wait(60)
        client.join()
    assert footprint.leftovers() == [], server.log_tail()
    assert answers[0] in (0, 200, 500, 503)
    assert answers[0] == 0 or ending != "kill -9 of the API server"
