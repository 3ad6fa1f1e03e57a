"""What a server writes: what matters when it starts, one line for each result, and nothing that looks like a fault."""

import logging

import pytest

from tests.unit.http_app import GENERATIONS, FakeEngine, make_app, send
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
