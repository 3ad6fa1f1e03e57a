"""What a server writes: what matters when it starts, one line for each result, and nothing that looks like a fault."""

import logging
import os

import psutil
import pytest
from vllm.entrypoints.launchers import launcher

from tests.unit.http_app import GENERATIONS, FakeEngine, make_app, send
from vllm_cfg_plugin import plugin
from vllm_cfg_plugin.compat import quiet_logs
from vllm_cfg_plugin.compat.api_server import know_own_port
from vllm_cfg_plugin.compat.quiet_logs import QuietFilter


@pytest.fixture
def written():
    """Messages of our loggers, which do not reach pytest's own handler."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("vllm.vllm_cfg_plugin")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_start_says_model_limits_routes_and_address(monkeypatch, written):
    make_app(FakeEngine(), monkeypatch)
    lines = "\n".join(written)
    assert "Serving emoji, alias: QwenImagePipeline, text-to-image, in float32" in lines
    assert "up to 65536 pixels, 50 steps" in lines
    assert "POST /v1/images/generations" in lines
    assert "Ready at http://localhost:8000/v1" in lines
    assert len(written) <= 10


def test_a_result_is_one_line(monkeypatch, written):
    app = make_app(FakeEngine(), monkeypatch)
    written.clear()
    send(app, GENERATIONS, json={"prompt": "a cat", "seed": 5}, headers={"X-Request-Id": "mine"})
    (line,) = written
    assert line.startswith("img-mine-0: 64x64, 20 steps, not guided, seed 5: ")


@pytest.mark.parametrize("is_stopped", [False, True])
def test_an_engine_that_its_server_stops_is_no_fault(monkeypatch, is_stopped):
    monkeypatch.setattr("vllm_cfg_plugin.compat.engine_deaths.was_stopped", lambda: is_stopped)
    record = logging.LogRecord("vllm.x", logging.ERROR, "", 0, "AsyncLLM output_handler failed.", (), None)
    assert QuietFilter().filter(record) is not is_stopped


@pytest.mark.parametrize(
    ("message", "stays"),
    [
        ("Using max model len %s", False),
        ("Chunked prefill is enabled with max_num_batched_tokens=%d.", False),
        ("`CLIPImageProcessor` requires torchvision (not installed); falling back", False),
        ("Chat template warmup failed", False),
        ("Token budget: %d tokens", True),
        ("cfg rank 1 died", True),
    ],
)
def test_untrue_records_are_dropped(message, stays):
    """Records that are untrue of a diffusion pipeline are dropped."""
    record = logging.LogRecord("vllm.x", logging.WARNING, "", 0, message, (1,), None)
    assert QuietFilter().filter(record) is stays


@pytest.mark.parametrize("of_diffusion", [False, True])
def test_processes_that_a_server_spawns_are_quiet_too(monkeypatch, of_diffusion):
    """And those of an ordinary model are as ever."""
    quietened = []
    monkeypatch.setattr(quiet_logs, "quiet_logs", lambda: quietened.append(True))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("CFG_PLUGIN_QUIET_LOGS", None)
    if of_diffusion:
        quiet_logs.quiet_logs_of_children()
    plugin.register()  # what vLLM calls early in each of its processes
    assert quietened == [True] * of_diffusion


class Neighbour:
    """A process with this server's port."""

    def __init__(self, parent, command=None):
        self.ppid = lambda: parent
        self.command = command

    def cmdline(self):
        if self.command is None:
            raise psutil.ZombieProcess(1)
        return self.command


@pytest.mark.parametrize(
    ("process", "is_named"),
    [
        (None, False),
        (Neighbour(os.getppid(), ["VLLM::APIServer_1"]), False),
        (Neighbour(os.getppid()), False),
        (Neighbour(1), False),
        (Neighbour(1, ["nc", "-l"]), True),
    ],
    ids=["nobody", "another API server", "one that has ended", "a stranger that has ended", "a stranger"],
)
def test_only_a_stranger_on_the_port_is_named(monkeypatch, process, is_named):
    monkeypatch.setattr(launcher, "find_process_using_port", lambda port: process)
    know_own_port()
    found = launcher.find_process_using_port(8000)
    assert (found is not None) == is_named
    assert not is_named or " ".join(found.cmdline()) == "nc -l"
