"""Images as server-sent events in front of a fake engine: OpenAI's events, errors in mid-stream, who leaves."""

import asyncio
import json

import numpy as np
import openai
import pytest

from tests.unit.edits import CAT, EDIT_INFO
from tests.unit.fakes import INFO, answer
from tests.unit.http_app import GENERATIONS, FakeEngine, ask, decode, disconnect_when, make_app, send
from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.engine.progress import Preview, Progress, Queued
from vllm_cfg_plugin.engine.result import ResultHeader, pack_result
from vllm_cfg_plugin.entrypoints.images import stream

GOOD = {"prompt": "a cat", "seed": 5, "stream": True}


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def app(engine, monkeypatch):
    return streaming_app(engine, monkeypatch, INFO)


def streaming_app(engine, monkeypatch, info):
    """The application, whose engine says what it does and makes the previews that it is asked for."""
    app = make_app(engine, monkeypatch, info)
    updates = app.state.engine_calls.updates
    updates.are_heard = True

    async def behave(request):
        for index in range(request.previews):
            updates._note(Progress(request.progress_key, index + 1, request.steps), None)
            pixels = np.full((1, request.height, request.width, 3), 10 * index, np.uint8)
            updates._note(Preview(request.progress_key, index, pixels.shape), pixels)
            await asyncio.sleep(0)
        return answer(request)

    engine.behave = behave
    return app


def events(app, **fields):
    """What OpenAI's client makes of the stream."""

    async def use(client):
        asked = client.images.generate(model="emoji", prompt="a cat", stream=True, extra_body={"seed": 5}, **fields)
        return [event async for event in await asked]

    return ask(app, use)


def test_previews_come_first_and_the_image_is_a_plain_ones(app):
    """Previews come first and the image is that of a plain request."""
    *previews, last = events(app, partial_images=2, size="96x64")
    assert [event.type for event in previews] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in previews] == [0, 1]
    assert [np.asarray(decode(event.b64_json)).mean() for event in previews] == [0, 10]
    assert last.type == "image_generation.completed"
    assert (last.size, last.quality, last.background, last.output_format) == ("96x64", "high", "opaque", "png")
    assert (last.seed, last.usage.total_tokens) == (5, 5 + 96)
    plain = send(app, GENERATIONS, json={"prompt": "a cat", "seed": 5, "size": "96x64"}).json()
    assert plain["data"][0]["b64_json"] == last.b64_json


def test_without_previews_there_is_one_event_for_each_image(app):
    done = events(app, n=3, output_format="jpeg")
    assert [event.type for event in done] == ["image_generation.completed"] * 3
    assert sorted((event.image_index, event.seed) for event in done) == [(0, 5), (1, 6), (2, 7)]
    assert {decode(event.b64_json).format for event in done} == {"JPEG"}


def test_edits_have_events_of_their_own(engine, monkeypatch):
    async def use(client):
        asked = client.images.edit(image=CAT, prompt="a cat", stream=True, partial_images=1)
        return [event.type async for event in await asked]

    app = streaming_app(engine, monkeypatch, EDIT_INFO)
    assert ask(app, use) == ["image_edit.partial_image", "image_edit.completed"]


def test_who_does_not_stream_asks_the_engine_for_nothing_more(app, engine):
    send(app, GENERATIONS, json={**GOOD, "stream": False})
    (request,) = engine.requests.values()
    assert (request.previews, request.progress_key) == (0, "")


def test_comments_say_how_far_it_is(app, engine, monkeypatch):
    monkeypatch.setattr(stream, "_COMMENT_SECONDS", 0.01)
    monkeypatch.setattr(stream, "_SILENT_SECONDS", 0.05)
    updates = app.state.engine_calls.updates

    async def behave(request):
        await asyncio.sleep(0.05)
        updates._note(Progress(request.progress_key, 7, request.steps), None)
        await asyncio.sleep(0.3)
        return answer(request)

    engine.behave = behave
    response = send(app, GENERATIONS, json=GOOD)
    assert response.headers["content-type"].startswith("text/event-stream")
    comments = [line for line in response.text.splitlines() if line.startswith(":")]
    assert comments[0] == ": step 0 of 20"
    assert comments.count(": step 7 of 20") >= 3, "silence is broken"
    assert response.text.rstrip().splitlines()[-1].startswith('data: {"type":"image_generation.completed"')


def test_comments_say_where_in_line_it_is(app, engine, monkeypatch):
    monkeypatch.setattr(stream, "_COMMENT_SECONDS", 0.01)
    updates = app.state.engine_calls.updates

    async def behave(request):
        for ahead in (7, 2):
            updates._note(Queued(request.progress_key, ahead), None)
            await asyncio.sleep(0.05)
        updates._note(Progress(request.progress_key, 1, request.steps), None)
        await asyncio.sleep(0.05)
        return answer(request)

    engine.behave = behave
    comments = [line for line in send(app, GENERATIONS, json=GOOD).text.splitlines() if line.startswith(":")]
    assert comments[-2:] == [": queued behind 2", ": step 1 of 20"]


def test_a_failure_in_mid_stream_raises_in_the_client(app, engine):
    async def fail(request):
        return pack_result(ResultHeader(metrics=RequestMetrics(), error="out of memory"))

    engine.behave = fail
    with pytest.raises(openai.APIError, match="out of memory"):
        events(app)


def test_a_wrong_request_is_a_plain_error_and_no_stream(app, engine):
    response = send(app, GENERATIONS, json={**GOOD, "size": "63x64"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "size")
    assert engine.requests == {}


def test_a_server_that_stops_ends_its_streams(app, engine):
    async def hang(request):
        app.state.server.should_exit = True
        await asyncio.sleep(60)

    engine.behave = hang
    with pytest.raises(openai.APIError, match="shutting down"):
        events(app)
    assert len(engine.cancelled) == 1


def test_a_client_that_leaves_cancels_all_its_images(app, engine):
    engine.behave = lambda request: asyncio.sleep(60)
    body = json.dumps({**GOOD, "n": 2}).encode()
    disconnect_when(lambda: bool(engine.requests), app, GENERATIONS, "application/json", body)
    assert len(engine.cancelled) == 2
    assert app.state.input_budget.held == 0


def test_nothing_is_held_when_a_stream_has_ended(app):
    events(app, partial_images=3)
    assert app.state.input_budget.held == 0
    assert app.state.engine_calls.updates._observers == {}
