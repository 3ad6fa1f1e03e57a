"""Two API servers of one engine and the bundled model: what a start and an end write, the spans that a collector gets,
what popular applications send, and requests of every kind that the description of the API allows or forbids.
"""

import base64
import io
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import schemathesis
from PIL import Image
from schemathesis import GenerationMode

from examples.vllm_server import VllmServer
from tests.e2e.conftest import START_TIMEOUT_S
from tests.e2e.otlp_collector import Collector
from tests.e2e.server import Footprint, gauge
from tests.openapi_checks import check_answers
from tests.unit.test_client_payloads import GENERATED

pytestmark = pytest.mark.e2e

EMOJI = Path(__file__).parents[2] / "examples/models/emoji"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SCREEN = 35  # lines of a terminal's window
FAULT = re.compile(r"WARNING|ERROR|Traceback|Exception")


@pytest.fixture(scope="module")
def collector():
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(collector, tmp_path_factory):
    options = ["--cfg-parallel-size", "2", "--served-model-name", "emoji", "alias", "--api-server-count", "2"]
    options += ["--otlp-traces-endpoint", collector.endpoint]
    log = tmp_path_factory.mktemp("server") / "server.log"
    with VllmServer(EMOJI, options, log, collector.env) as server:
        server.wait_ready(START_TIMEOUT_S)  # the first one that is
        deadline = time.monotonic() + START_TIMEOUT_S
        while server.log_tail(10**6).count("Application startup complete.") < 2:
            assert time.monotonic() < deadline, server.log_tail()
            time.sleep(0.2)
        yield server


def ask(server, n=1, **headers):
    # A connection of its own each: the kernel hands it to one of the two servers.
    body = {"prompt": "a house", "size": "64x64", "num_inference_steps": 4, "n": n}
    answer = requests.post(f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text


def test_the_start_fits_on_a_screen_and_shows_no_fault(server):
    lines = [
        line for line in server.log_tail(10**6).splitlines() if "Loading" not in line
    ]  # bars, one line on a screen
    assert len(lines) <= SCREEN, "\n".join(lines)
    assert [line for line in lines if FAULT.search(line) and "ulimit" not in line] == []
    assert sum("Ready at http://" in line for line in lines) == 1
    assert "1048575" not in "\n".join(lines)


def test_spans_continue_the_trace_of_their_client(server, collector):
    ask(server, n=2, traceparent=f"00-{TRACE}-{PARENT}-01")
    ask(server)
    spans = collector.spans_of(TRACE, 2)
    assert [(span.name, span.parent_span_id.hex()) for span in spans] == [("llm_request", PARENT)] * 2
    (attributes, _) = [{item.key: item.value for item in span.attributes} for span in spans]
    assert attributes["gen_ai.request.id"].string_value.startswith("img-")
    assert 0 < attributes["gen_ai.latency.e2e"].double_value < 60


def test_results_of_both_servers_are_counted(server):
    done = 'vllm_cfg:results_total{outcome="done"}'
    before = gauge(server, done)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ask(server), range(12)))
    assert gauge(server, done) == before + 12


@pytest.mark.parametrize("name", GENERATED)
def test_what_applications_send_is_served(server, name):
    url = f"{server.url}/v1/images/generations?api-version=2025-04-01-preview"
    answer = requests.post(url, json=GENERATED[name], timeout=60)
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert image.size == (64, 64)


@pytest.mark.parametrize("mode", GenerationMode)
def test_answers_are_as_described(server, mode):
    check_answers(schemathesis.openapi.from_url(f"{server.url}/openapi.json"), mode, examples=4)
    assert "UserWarning" not in server.log_tail(10**6), "of two routes of one name"


def test_the_end_shows_no_fault_and_leaves_nothing(server):
    """The last test here: it ends the server."""
    footprint, began = Footprint.of(server), len(server.log_tail(10**6))
    assert server.stop(signal.SIGTERM) == 0
    said = server.log_tail(10**6)[began:]
    assert [line for line in said.splitlines() if FAULT.search(line) or "is used by process" in line] == []
    assert footprint.leftovers() == []
