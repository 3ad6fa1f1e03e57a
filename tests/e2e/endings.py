"""However a server ends, in the middle of a request: no processes, sockets or shared memory are left."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import requests

from examples.vllm_server import VllmServer
from tests.e2e.server import Footprint, engine_core, wait_for_running

ENDINGS: dict[str, Callable[[VllmServer], None]] = {
    "SIGTERM": lambda server: server.process.send_signal(signal.SIGTERM),
    "SIGINT": lambda server: server.process.send_signal(signal.SIGINT),
    "kill -9 of the API server": lambda server: server.process.kill(),
    "kill -9 of EngineCore": lambda server: engine_core(server).kill(),
}

EXIT_CODES = {"SIGTERM": 0, "SIGINT": 0, "kill -9 of the API server": -signal.SIGKILL, "kill -9 of EngineCore": 1}


def end_amid_a_request(server: VllmServer, ending: str, path: str = "/v1/images/generations", **request: Any) -> None:
    """End a server while it works on a request, which must take longer than a few seconds.

    Args:
        request: as for `requests.post`.
    """
    answers: list[int] = []

    def send() -> None:
        try:
            answers.append(requests.post(f"{server.url}{path}", timeout=120, **request).status_code)
        except requests.ConnectionError:  # of a server that was killed
            answers.append(0)

    client = threading.Thread(target=send)
    client.start()
    wait_for_running(server, 1, timeout_s=20)
    footprint = Footprint.of(server)
    ENDINGS[ending](server)
    if ending.startswith("SIG"):
        late = requests.post(f"{server.url}{path}", timeout=60, **request)
        assert late.status_code == 503, "one that comes during the drain is refused, and no reason to fail the others"
    server.process.wait(60)
    client.join()
    server.stop()
    assert footprint.leftovers() == [], server.log_tail()
    assert server.process.returncode == EXIT_CODES[ending], server.log_tail()
    expected = {"kill -9 of the API server": (0,), "kill -9 of EngineCore": (0, 500, 503)}
    assert answers[0] in expected.get(ending, (200, 503))
