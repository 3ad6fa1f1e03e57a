"""Limits over all requests, on every route: what has no room gets a 429 before any work, and room comes back."""

import asyncio
import gc
import json
import threading
import tracemalloc
from dataclasses import replace

import httpx
import pytest
from msgspec import structs
from PIL import Image
from vllm.exceptions import QueueOverflowError

from tests.unit.edits import CAT, EDIT_INFO, LAYERED_INFO, assert_refused, edit, image_file
from tests.unit.fakes import IMAGE_TO_VIDEO_INFO, INFO, LIMITS, VIDEO_INFO, answer
from tests.unit.http_app import EDITS, GENERATIONS, FakeEngine, disconnect_mid_denoise, disconnect_when, make_app, send
from vllm_cfg_plugin.checkpoint import TextRules
from vllm_cfg_plugin.engine.calibration import Calibration
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.engine.result import ResultHeader, pack_result
from vllm_cfg_plugin.entrypoints import error_route
from vllm_cfg_plugin.entrypoints import service as serving
from vllm_cfg_plugin.entrypoints.input_budget import InputBudget, InputHold
from vllm_cfg_plugin.params import RequestLimits

VIDEOS = "/v1/videos"
CAT_BYTES = 16 * 8 * 3  # of CAT, decoded
FORM = {"data": {"prompt": "a hat"}, "files": [("image", ("cat.png", CAT))]}
JSON = {"json": {"prompt": "a hat"}}
# route -> (model, a good request)
ROUTES = {
    "generations": (INFO, GENERATIONS, JSON),
    "edits": (EDIT_INFO, EDITS, FORM),
    "video, JSON": (VIDEO_INFO, VIDEOS, JSON),
    "video, form": (IMAGE_TO_VIDEO_INFO, VIDEOS, {**FORM, "files": [("input_reference", ("cat.png", CAT))]}),
}


@pytest.fixture
def engine():
    return FakeEngine()


def edit_app(engine, monkeypatch, **limits):
    return make_app(engine, monkeypatch, EDIT_INFO, structs.replace(LIMITS, **limits))


def assert_busy(response, *words):
    """OpenAI's clients read the status, the header and the error object, and try again."""
    assert response.status_code == 429, response.text
    assert int(response.headers["Retry-After"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("RateLimitError", None, 429)
    for word in words:
        assert word in error["message"]


def encoded(images) -> tuple[str, bytes]:
    """Content type and body of an edit."""
    files = [("image[]", (f"{index}.png", image)) for index, image in enumerate(images)]
    request = httpx.Request("POST", "http://test", data={"prompt": "a hat"}, files=files)
    return request.headers["Content-Type"], request.read()


def nothing_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", None)


@pytest.mark.parametrize("route", ROUTES)
def test_a_full_queue_refuses_a_request_before_it_is_read(engine, monkeypatch, route):
    info, path, request = ROUTES[route]
    app = make_app(engine, monkeypatch, info)
    engine.queue_room = 0
    read = []

    async def body():
        read.append(1)
        yield b"{"

    assert_busy(send(app, path, content=body()), "--max-num-queued-reqs")
    assert read == []
    assert_busy(send(app, path, **request), "--max-num-queued-reqs")
    assert engine.requests == {}
    assert app.state.videos_service.jobs.page(None, 10, "asc").data == []
    engine.queue_room = 1
    assert send(app, path, **request).status_code == 200


def test_a_full_queue_lets_videos_be_watched(engine, monkeypatch):
    app = make_app(engine, monkeypatch, VIDEO_INFO)
    engine.queue_room = 0

    async def listed():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get(VIDEOS)

    assert asyncio.run(listed()).status_code == 200


def test_all_results_count_before_images_are_decoded(engine, monkeypatch):
    """All results of a request are counted before its images are decoded."""
    app = edit_app(engine, monkeypatch)
    engine.queue_room = 2
    with monkeypatch.context() as patch:
        nothing_is_decoded(patch)
        assert_busy(edit(app, {"n": "3"}), "--max-num-queued-reqs")
    assert engine.requests == {}
    assert edit(app, {"n": "2"}).status_code == 200
    assert len(engine.requests) == 2


def test_more_results_than_may_ever_wait(engine, monkeypatch):
    app = make_app(engine, monkeypatch)
    engine.vllm_config.scheduler_config.max_num_queued_reqs = 3
    refused = send(app, GENERATIONS, json={"prompt": "a", "n": 4})
    assert_refused(refused, "n", "at most 3", "--max-num-queued-reqs")
    assert send(app, GENERATIONS, json={"prompt": "a", "n": 3}).status_code == 200


def test_a_place_that_another_api_server_took_is_one_429(engine, monkeypatch):
    async def behave(request):
        raise QueueOverflowError

    engine.behave = behave
    assert_busy(send(make_app(engine, monkeypatch), GENERATIONS, json={"prompt": "a", "n": 3}))


def at_once(app, engine, requests):
    """The answers of edits that are sent together, while a decoder is slow."""

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await asyncio.gather(*[client.post(EDITS, **request) for request in requests])

    return asyncio.run(run())


def test_requests_that_arrive_together_do_not_overbook(engine, monkeypatch):
    """The second is refused while the first one's images are decoded, when the engine has none of them yet."""
    app = edit_app(engine, monkeypatch)
    engine.queue_room = 3
    two = {**FORM, "data": {"prompt": "a", "n": "2"}}
    statuses = sorted(response.status_code for response in at_once(app, engine, [two, two]))
    assert statuses == [200, 429]
    assert len(engine.requests) == 2
    assert app.state.engine_calls._promised == 0


# ---- limits of one request ----

PICTURE = [("image", ("cat.png", CAT))]  # of 128 pixels
NAMED = {
    "max_image_pixels": [
        ({"max_image_pixels": 64 * 64 - 1}, INFO, {}, "size"),
        ({"max_image_pixels": 4 * 64 * 64 - 1}, LAYERED_INFO, {}, "layers"),
        ({"max_image_pixels": 4 * 64 * 64}, LAYERED_INFO, {"layers": 5}, "layers"),
        ({"max_image_pixels": 64 * 64}, INFO, {"n": 5}, "n"),
        ({"max_image_pixels": 64 * 64 * 4}, LAYERED_INFO, {"n": 5}, "n"),
    ],
    "max_video_pixels": [({"max_video_pixels": 9 * 64 * 64 - 1}, VIDEO_INFO, {}, "num_frames")],
    "max_inference_steps": [({"max_inference_steps": 19}, INFO, {}, "num_inference_steps")],
    "max_request_seconds": [({"max_request_seconds": 9}, INFO, {"n": 10}, "num_inference_steps")],
    "max_input_images": [({"max_input_images": 1}, EDIT_INFO, {}, "image")],
    "max_input_pixels": [
        ({"max_input_pixels": 127}, EDIT_INFO, {}, "image[0]"),
        ({"max_input_pixels": 128}, EDIT_INFO, {"n": 3}, "n"),
        ({"max_input_pixels": 128}, replace(EDIT_INFO, max_images=9), {"images": 5}, "image"),
    ],
    "max_upload_bytes": [({"max_upload_bytes": 9}, INFO, {}, "body")],
    "max_input_bytes_in_flight": [({"max_input_bytes_in_flight": 2000}, EDIT_INFO, {"n": 3}, "image")],
}


def ask_for(app, info, fields):
    fields = {"prompt": "a", **fields}
    if info.produces == "video":
        return send(app, VIDEOS, json=fields)
    if not info.min_images:
        return send(app, GENERATIONS, json=fields)
    files = PICTURE * fields.pop("images", min(2, info.max_images))
    return send(app, EDITS, data={name: str(value) for name, value in fields.items()}, files=files)


def test_every_limit_is_among_these():
    assert set(NAMED) == set(RequestLimits.__struct_fields__)


@pytest.mark.parametrize(
    ("name", "limits", "info", "fields", "param"), [(name, *case) for name, cases in NAMED.items() for case in cases]
)
def test_an_error_names_the_flag_that_the_operator_may_raise(engine, monkeypatch, name, limits, info, fields, param):
    second = structs.replace(UNCALIBRATED, step_us=0, token_us=10**6 / 20 / 65)  # of one result of 20 steps
    engine.calibration = Calibration(cost=second, token_budget=9, default_tokens=16)
    app = make_app(engine, monkeypatch, info, structs.replace(RequestLimits(), **limits))
    assert_refused(ask_for(app, info, fields), param, f"--{name.replace('_', '-')}")
    assert engine.requests == {}
    app = make_app(engine, monkeypatch, info, structs.replace(RequestLimits(), max_request_seconds=10**6))
    assert ask_for(app, info, fields).status_code == 200


MANY = b'{"prompt": "a", "x": [' + b"[]," * 400_000 + b"1]}"


@pytest.mark.parametrize(("path", "info"), [(GENERATIONS, INFO), (VIDEOS, VIDEO_INFO)])
def test_a_body_of_many_values_is_not_parsed(engine, monkeypatch, path, info):
    app = make_app(engine, monkeypatch, info)
    monkeypatch.setattr(json, "loads", None)
    refused = send(app, path, content=MANY, headers={"Content-Type": "application/json"})
    monkeypatch.undo()
    assert_refused(refused, "body", "of at most")


@pytest.mark.parametrize(("path", "info"), [(GENERATIONS, INFO), (VIDEOS, VIDEO_INFO)])
def test_the_longest_prompts_have_room(engine, monkeypatch, path, info):
    app = make_app(engine, monkeypatch, replace(info, text=TextRules(max_tokens=32_000)))
    fields = {"prompt": "\U0001f600" * 32_000, "negative_prompt": ",\U0001f600" * 16_000}
    assert send(app, path, content=json.dumps(fields), headers={"Content-Type": "application/json"}).status_code == 200


# ---- the memory of inputs ----


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "another"}, "model"),
        ({"size": "65x64"}, "size"),
        ({"size": "512x512"}, "size"),
        ({"num_inference_steps": "51"}, "num_inference_steps"),
        ({"n": "11"}, "n"),
        ({"true_cfg_scale": "-1"}, "true_cfg_scale"),
        ({"guidance_scale": "1"}, "guidance_scale"),
        ({"guidance_interval[]": ["1", "0"]}, "guidance_interval"),
        ({"negative_prompt": "x" * 21}, "negative_prompt"),
        ({"prompt": "x" * 21}, "prompt"),
        ({"seed": str(2**63)}, "seed"),
        ({"output_format": "jpeg", "size": "65504x8"}, "output_format"),
    ],
)
def test_whatever_is_wrong_is_found_before_a_pixel_is_decoded(engine, monkeypatch, fields, param):
    app = edit_app(engine, monkeypatch, max_image_pixels=8 * 65504 if "output_format" in fields else 256 * 256)
    nothing_is_decoded(monkeypatch)
    response = edit(app, fields)
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["param"] == param
    assert app.state.input_budget.held == 0


def test_all_headers_are_read_before_a_pixel_is_decoded(engine, monkeypatch):
    """A bad image after good ones costs no more than its header."""
    app = edit_app(engine, monkeypatch)
    nothing_is_decoded(monkeypatch)
    assert_refused(edit(app, files=[("image", CAT), ("image", b"no image")]), "image[1]")


def test_images_that_never_fit_are_refused_undecoded(engine, monkeypatch):
    """One copy here, and with each of two results one in the engine and one on its rank."""
    upload = 600
    app = edit_app(engine, monkeypatch, max_input_bytes_in_flight=5 * CAT_BYTES + upload - 1)
    with monkeypatch.context() as patch:
        nothing_is_decoded(patch)
        response = edit(app, {"n": "2", "user": "x" * upload})
        assert_refused(response, "image", "--max-input-bytes-in-flight", str(5 * CAT_BYTES + upload - 1))
    assert edit(app, {"n": "1"}).status_code == 200


def test_images_that_do_not_fit_now_are_busy_and_fit_later(engine, monkeypatch):
    app = edit_app(engine, monkeypatch, max_input_bytes_in_flight=5 * CAT_BYTES)
    responses = sorted(at_once(app, engine, [FORM, FORM]), key=lambda response: response.status_code)
    assert [response.status_code for response in responses] == [200, 429]
    assert_busy(responses[1], "--max-input-bytes-in-flight")
    assert app.state.input_budget.held == 0
    assert edit(app).status_code == 200


def test_a_body_that_has_no_room_is_not_read(engine, monkeypatch):
    app = edit_app(engine, monkeypatch, max_input_bytes_in_flight=5000)
    files = [("image", ("big.png", b"x" * 5000))]
    assert_refused(edit(app, files=files), "body", "--max-input-bytes-in-flight")
    app.state.input_budget.held = 4900
    assert_busy(edit(app), "--max-input-bytes-in-flight")
    sent = []

    async def chunks():  # of a length that is not announced
        for _ in range(50):
            sent.append(1)
            yield b"x" * 1000

    app.state.input_budget.held = 2000
    response = send(app, VIDEOS, content=chunks(), headers={"Content-Type": "application/json"})
    assert_busy(response, "--max-input-bytes-in-flight")
    assert len(sent) < 8
    assert app.state.input_budget.held == 2000


async def fail(request):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("behave", [None, fail], ids=["done", "failed"])
def test_the_budget_is_given_back_at_the_end(engine, monkeypatch, behave):
    held = []
    app = edit_app(engine, monkeypatch)

    async def look(request):
        held.append(app.state.input_budget.held)
        return answer(request) if behave is None else await behave(request)

    engine.behave = look
    edit(app, {"n": "2"})
    assert held[0] > 5 * CAT_BYTES
    assert app.state.input_budget.held == 0


def test_the_budget_is_given_back_when_the_client_leaves(engine, monkeypatch):
    app = edit_app(engine, monkeypatch)
    disconnect_mid_denoise(app, engine, EDITS, *encoded([CAT]))
    assert len(engine.cancelled) == 1
    assert app.state.input_budget.held == 0


def test_images_of_a_client_that_leaves_stay_undecoded(engine, monkeypatch):
    """A client that leaves stops its images from being decoded."""
    app = edit_app(engine, monkeypatch)
    decoded, left = [], threading.Event()
    read = serving.read_image

    def slow(*args):
        decoded.append(args)
        left.wait(5)
        return read(*args)

    monkeypatch.setattr(serving, "read_image", slow)

    disconnect_when(lambda: bool(decoded), app, EDITS, *encoded([CAT] * 3))
    left.set()
    assert (len(decoded), engine.requests) == (1, {})
    assert (app.state.input_budget.held, app.state.engine_calls._promised) == (0, 0)


def test_a_video_holds_its_image_until_its_end(engine, monkeypatch):
    app = make_app(engine, monkeypatch, IMAGE_TO_VIDEO_INFO)
    held = []

    async def run():
        ended = asyncio.Event()

        async def wait(request):
            await ended.wait()
            return answer(request)

        engine.behave = wait
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for delete in (False, True):
                ended.clear()
                files = [("input_reference", ("cat.png", CAT))]
                job = (await client.post(VIDEOS, data={"prompt": "a"}, files=files)).json()
                held.append(app.state.input_budget.held)
                if delete:
                    await client.delete(f"{VIDEOS}/{job['id']}")
                ended.set()
                for _ in range(200):
                    if not app.state.input_budget.held:
                        break
                    await asyncio.sleep(0.01)
                held.append(app.state.input_budget.held)

    asyncio.run(run())
    assert held[0] == held[2] > 3 * CAT_BYTES
    assert held[1] == held[3] == 0


@pytest.mark.parametrize("is_read", [True, False])
def test_an_answer_counts_until_its_client_has_read_it_or_left(engine, monkeypatch, is_read):
    """The server behind `send` takes a piece when there is room for it in the connection."""
    app = edit_app(engine, monkeypatch)
    content_type, body = encoded([CAT])
    scope = {"type": "http", "method": "POST", "path": EDITS, "query_string": b""}
    scope["headers"] = [(b"content-type", content_type.encode())]
    sent, held = [], []

    async def run():
        may_go_on = asyncio.Event()

        async def receive():
            while held:
                await asyncio.sleep(1)
            held.append(app.state.input_budget.held)
            return {"type": "http.request", "body": body}

        async def send(message):
            sent.append(message)
            held.append(app.state.input_budget.held)
            if len(sent) == 3:
                await may_go_on.wait()

        monkeypatch.setattr(error_route, "_PIECE_BYTES", 1000)
        task = asyncio.create_task(app(scope, receive, send))
        while len(sent) < 3:
            await asyncio.sleep(0.001)
        if is_read:
            may_go_on.set()
        else:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    length = int(dict(sent[0]["headers"])[b"content-length"])
    assert held[2] == length > 5000  # of the answer, and of the input no more
    assert app.state.input_budget.held == 0
    if is_read:
        whole = b"".join(message["body"] for message in sent[1:])
        assert len(whole) == length
        assert json.loads(whole)["data"]
        assert max(len(message["body"]) for message in sent[1:]) == 1000
        assert [bool(message.get("more_body")) for message in sent[1:]] == [True] * (len(sent) - 2) + [False]


def test_a_file_that_is_sent_in_parts_counts_part_by_part():
    budget, held = InputBudget(1000), []

    async def send(message):
        held.append(budget.held)

    async def run():
        with InputHold(budget) as hold:
            counting = error_route._in_pieces(send, hold)
            for _ in range(3):
                await counting({"type": "http.response.body", "body": b"x" * 100, "more_body": True})
            await counting({"type": "http.response.body", "body": b""})

    asyncio.run(run())
    assert held == [100, 100, 100, 0]


@pytest.mark.parametrize("ending", ["damaged", "failed", "left"])
def test_pixels_of_a_failed_request_are_freed_at_once(engine, monkeypatch, ending):
    """Without the garbage collector, which a server runs over everything once in many minutes."""
    app = edit_app(engine, monkeypatch)
    good = image_file(size=(1000, 1000))
    bad = image_file(size=(64, 64))[:-30]
    files = [("image", ("good.png", good))] + [("image", ("bad.png", bad))] * (ending == "damaged")
    if ending == "failed":
        failure = pack_result(ResultHeader(metrics=RequestMetrics(), error="out of memory"))
        engine.behave = lambda request: asyncio.sleep(0, failure)

    def act():
        if ending == "left":
            disconnect_mid_denoise(app, engine, EDITS, *encoded([good]))
        else:
            assert edit(app, files=files).status_code >= 400
        engine.requests.clear()

    act()  # imports
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        act()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert peak > 3_000_000 > 1_000_000 > held
