"""The trace that a client says its request is part of goes to the engine, whose spans continue it."""

import pytest

from tests.unit.fakes import INFO, VIDEO_INFO
from tests.unit.http_app import GENERATIONS, FakeEngine, make_app, send

PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
STATE = {"tracestate": "vendor=1"}


@pytest.mark.parametrize("body", [{}, {"n": 2}, {"stream": True}], ids=str)
def test_each_result_is_part_of_its_requests_trace(monkeypatch, body):
    engine = FakeEngine()
    app = make_app(engine, monkeypatch, INFO)
    send(app, GENERATIONS, json={"prompt": "a cat", **body}, headers={**PARENT, **STATE, "X-Other": "1"})
    assert engine.traces == [{**PARENT, **STATE}] * body.get("n", 1)


def test_a_request_without_a_trace_has_none(monkeypatch):
    engine = FakeEngine()
    app = make_app(engine, monkeypatch, INFO)
    for headers in (PARENT, {}):
        send(app, GENERATIONS, json={"prompt": "a cat"}, headers=headers)
    assert engine.traces == [PARENT, None]


def test_a_videos_job_is_part_of_its_requests_trace(monkeypatch):
    engine = FakeEngine()
    send(make_app(engine, monkeypatch, VIDEO_INFO), "/v1/videos", json={"prompt": "a cat"}, headers=PARENT)
    assert engine.traces == [PARENT]
