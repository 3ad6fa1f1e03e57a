"""The HTTP routes in front of a fake engine: the wire format, every refusal, cancellation. No processes, no weights."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from vllm.exceptions import RetryableRequestError
from vllm.v1.engine.exceptions import EngineDeadError

from tests.unit.fakes import IMAGE_TO_VIDEO_INFO, INFO, LIMITS, fake_pixels
from tests.unit.http_app import GENERATIONS, FakeEngine, ask, decode, disconnect_mid_denoise, make_app, send
from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.engine.result import ResultHeader, pack_result
from vllm_cfg_plugin.params import DiffusionParams, RequestLimits, StepCache

GOOD = {"prompt": "a cat", "seed": 5}


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def app(engine, monkeypatch):
    return make_app(engine, monkeypatch)


def post(app, body=None, *, content=None):
    data = json.dumps(body).encode() if content is None else content
    return send(app, GENERATIONS, content=data, headers={"Content-Type": "application/json"})


def test_an_image_and_its_description(app, engine):
    response = post(app, {**GOOD, "negative_prompt": " ", "true_cfg_scale": 3, "size": "96x64"})
    assert response.status_code == 200, response.text
    body = response.json()
    (image,) = body["data"]
    assert image["seed"] == 5
    assert image["metrics"]["guided"] is True
    assert image["metrics"]["e2e_time_ms"] > 0
    assert (body["size"], body["output_format"], body["background"], body["quality"]) == (
        "96x64",
        "png",
        "opaque",
        "high",
    )
    assert body["usage"]["total_tokens"] == 6 + 96
    (request,) = engine.requests.values()
    assert np.array_equal(np.asarray(decode(image["b64_json"])), fake_pixels(request)[0])


def test_the_official_client_reads_it(app):
    response = ask(
        app,
        lambda client: client.images.generate(
            model="emoji",
            prompt="a cat",
            n=2,
            size="auto",
            response_format="b64_json",
            extra_body={"seed": 3, "num_inference_steps": 4, "negative_prompt": "", "true_cfg_scale": 2.5},
        ),
    )
    assert [image.seed for image in response.data] == [3, 4]
    assert response.size == "64x64"
    assert response.usage.output_tokens == 128
    assert response.data[0].metrics["steps"] == 4


def test_n_images_are_n_requests_with_consecutive_seeds(app, engine):
    body = post(app, {**GOOD, "n": 3}).json()
    assert [image["seed"] for image in body["data"]] == [5, 6, 7]
    assert [request.seed for request in engine.requests.values()] == [5, 6, 7]
    assert len({image["b64_json"] for image in body["data"]}) == 3


def test_unset_seed_is_drawn_and_returned(app, engine):
    body = post(app, {"prompt": "a cat", "seed": None}).json()
    (request,) = engine.requests.values()
    assert body["data"][0]["seed"] == request.seed


@pytest.mark.parametrize(("sent", "expected"), [("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_formats(app, sent, expected):
    body = post(app, {**GOOD, "output_format": sent}).json()
    assert decode(body["data"][0]["b64_json"]).format == expected
    assert body["output_format"] == expected.lower()


def test_compression_makes_smaller_files(app):
    sizes = [
        len(post(app, {**GOOD, "output_format": "jpeg", "output_compression": q}).json()["data"][0]["b64_json"])
        for q in (0, 100)
    ]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("model", [None, "emoji", "alias"])
def test_all_served_names_are_accepted(app, model):
    assert post(app, {**GOOD, "model": model}).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 21}, "prompt"),
        ({"prompt": "x" * 40_000}, "prompt"),
        ({"size": "64"}, "size"),
        ({"size": "0x64"}, "size"),
        ({"size": "-64x64"}, "size"),
        ({"size": "65x64"}, "size"),
        ({"size": "512x512"}, "size"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": "two"}, "n"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"true_cfg_scale": float("nan")}, "true_cfg_scale"),
        ({"true_cfg_scale": float("inf")}, "true_cfg_scale"),
        ({"true_cfg_scale": -1}, "true_cfg_scale"),
        ({"guidance_scale": -0.5}, "guidance_scale"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"output_format": "gif"}, "output_format"),
        ({"response_format": "file"}, "response_format"),
        ({"quality": "max", "num_inference_steps": 7}, "quality"),
        ({"output_compression": 101, "output_format": "webp"}, "output_compression"),
        ({"partial_images": 1}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"partial_images": 1, "stream": True}, "partial_images"),  # this engine has no channel for previews
        ({"background": "transparent"}, "background"),
        ({"true_cfg_scal": 4}, "true_cfg_scal"),
        ({"\ud800": 4}, "body"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(app, engine, change, param):
    response = post(app, {**GOOD, **change})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["code"] == 400
    assert param in error["message"]
    assert "is not valid: " in error["message"]
    assert engine.requests == {}
    assert post(app, GOOD).status_code == 200


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff", b"", b'{"n": 1' + b"0" * 5000 + b"}"])
def test_a_body_that_is_no_object_is_a_400(app, content):
    response = post(app, content=content)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("digits", ["1" * 5000, "-" + "9" * 100_000])
def test_a_number_of_thousands_of_digits_is_named(app, digits):
    response = post(app, content=f'{{"prompt": "a", "seed": {digits}}}'.encode())
    assert (response.status_code, response.json()["error"]["param"]) == (400, "seed")
    assert "4300 digits" in response.json()["error"]["message"]


def test_a_wrong_model_is_a_404(app):
    response = post(app, {**GOOD, "model": "dall-e-3"})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"
    assert "emoji" in response.json()["error"]["message"]


def test_a_failed_request_is_a_500_and_aborts_its_siblings(app, engine):
    """A failed request is a 500 that names it and aborts its siblings."""

    async def fail_the_second(request):
        if request.seed != 6:
            await asyncio.sleep(60)
        return pack_result(ResultHeader(metrics=RequestMetrics(seed=6), error="out of memory"))

    engine.behave = fail_the_second
    response = post(app, {**GOOD, "n": 3})
    assert response.status_code == 500
    assert "out of memory" in response.json()["error"]["message"]
    assert "-1 failed" in response.json()["error"]["message"]
    assert len(engine.cancelled) == 2


def test_an_aborted_request_is_a_503(app, engine):
    async def abort(request):
        return torch.empty(0, dtype=torch.uint8)

    engine.behave = abort
    assert post(app, GOOD).status_code == 503


def test_a_stopping_server_answers_503(app, engine):
    async def hang(request):
        app.state.server.should_exit = True
        await asyncio.sleep(60)

    engine.behave = hang
    response = post(app, GOOD)
    assert response.status_code == 503
    assert "shutting down" in response.json()["error"]["message"]
    assert len(engine.cancelled) == 1


def test_a_dead_engine_is_what_it_is_elsewhere_in_vllm(app, engine):
    async def die(request):
        raise EngineDeadError

    engine.behave = die
    engine.errored, engine.is_running = True, False
    response = post(app, GOOD)
    assert response.status_code == 500
    assert app.state.server.should_exit


def test_a_paused_engine_is_a_503(app, engine):
    async def reject(request):
        raise RetryableRequestError("Generation is paused. Please retry after it resumes.")

    engine.behave = reject
    response = post(app, GOOD)
    assert response.status_code == 503
    assert "was not started: Generation is paused" in response.json()["error"]["message"]


def test_an_engine_stopped_by_its_server_is_a_503(app, engine):
    async def stop(request):
        asyncio.get_running_loop().call_later(0.1, setattr, app.state.server, "should_exit", True)
        raise EngineDeadError

    engine.behave = stop
    assert post(app, GOOD).status_code == 503


def test_a_disconnect_aborts_all_images(app, engine):
    disconnect_mid_denoise(app, engine, GENERATIONS, "application/json", json.dumps({**GOOD, "n": 2}).encode())
    assert len(engine.cancelled) == 2


GUIDANCE = {
    "guidance_interval": [0.25, 0.75],
    "guidance_rescale": 0.5,
    "cfg_normalize": True,
    "combine_rule": "cfg_zero_star",
}


def test_how_branches_are_combined_reaches_the_engine(app, engine):
    response = post(app, {**GOOD, **GUIDANCE, "negative_prompt": "", "true_cfg_scale": 3})
    assert response.status_code == 200, response.text
    (request,) = engine.requests.values()
    guidance = request.guidance
    assert (guidance.interval, guidance.rescale, guidance.scale) == ((0.25, 0.75), 0.5, 3.0)
    assert (guidance.normalize, guidance.rule) == (True, "cfg_zero_star")


def test_a_cache_of_steps_reaches_the_engine(app, engine):
    cache = {"cache": "static", "cache_interval": 3, "cache_range": [0.25, 1], "cache_order": 1}
    response = post(app, {**GOOD, **cache, "cache_branches": "negative", "negative_prompt": "", "true_cfg_scale": 3})
    assert response.status_code == 200, response.text
    (request,) = engine.requests.values()
    assert request.cache == StepCache(interval=3, range=(0.25, 1.0), order=1, negative_only=True)


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("cache", "adaptive", "cache"),
        ("cache", True, "cache"),
        ("cache_interval", 2, "cache_interval"),  # this and the next ones: of a cache that is off
        ("cache_range", [0, 0.5], "cache_range"),
        ("cache_order", 1, "cache_order"),
        ("cache_branches", "all", "cache_branches"),
        ("guidance_interval", [0.5], "guidance_interval"),
        ("guidance_interval", [0.5, 0.5], "guidance_interval"),
        ("guidance_interval", [-0.1, 0.5], "guidance_interval"),
        ("guidance_interval", [0, 1.1], "guidance_interval"),
        ("guidance_interval", [0, float("nan")], "guidance_interval"),
        ("guidance_interval", 0.5, "guidance_interval"),
        ("guidance_interval", [0, "1"], "guidance_interval[1]"),
        ("guidance_rescale", 1.5, "guidance_rescale"),
        ("guidance_rescale", "0.5", "guidance_rescale"),
        ("cfg_normalize", 1, "cfg_normalize"),
        ("cfg_normalize", "true", "cfg_normalize"),
        ("combine_rule", "apg2", "combine_rule"),
        ("combine_rule", 3, "combine_rule"),
        ("guidance_scale_2", 3.0, "guidance_scale_2"),  # this and the next ones: of other models
        ("layers", 4, "layers"),
        ("num_frames", 9, "num_frames"),
        ("image", "cat.png", "image"),
        ("mask", "mask.png", "mask"),
        ("input_fidelity", "high", "input_fidelity"),
    ],
)
def test_bad_guidance_and_fields_of_other_models_are_refused(app, engine, field, value, param):
    response = post(app, {**GOOD, field: value})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.requests == {}


def test_fields_of_edits_name_their_endpoint(app):
    assert "/v1/images/edits" in post(app, {**GOOD, "image": "cat.png"}).json()["error"]["message"]


def test_optional_fields_reach_a_model_that_reads_them(engine, monkeypatch):
    info = replace(INFO, needs_negative_prompt=False, options=frozenset({"guidance_scale_2"}))
    app = make_app(engine, monkeypatch, info)
    assert post(app, {**GOOD, "guidance_scale_2": 2.5}).status_code == 200
    (request,) = engine.requests.values()
    assert request.guidance.scale_2 == 2.5


def test_an_extra_body_in_the_body_is_lifted(app, engine):
    assert post(app, {"prompt": "a cat", "extra_body": {"seed": 9}}).json()["data"][0]["seed"] == 9
    assert post(app, {**GOOD, "extra_body": {"seed": 9}}).json()["error"]["param"] == "extra_body"  # which of the two?
    assert post(app, {**GOOD, "extra_body": {"sed": 9}}).json()["error"]["param"] == "sed"


def test_a_model_that_edits_only_names_the_endpoint(engine, monkeypatch):
    app = make_app(engine, monkeypatch, replace(INFO, min_images=1, max_images=2))
    response = post(app, GOOD)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "image"
    assert "/v1/images/edits" in response.json()["error"]["message"]


def test_a_video_model_names_the_endpoint(engine, monkeypatch):
    app = make_app(engine, monkeypatch, IMAGE_TO_VIDEO_INFO)
    response = post(app, GOOD)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"
    assert "/v1/videos" in response.json()["error"]["message"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_above_the_limit_is_refused_before_it_is_read(engine, monkeypatch, announced):
    limits = RequestLimits(max_image_pixels=LIMITS.max_image_pixels, max_upload_bytes=1000)
    app = make_app(engine, monkeypatch, limits=limits)
    sent = []

    async def chunks():
        for _ in range(20):
            sent.append(100)
            yield b" " * 100

    headers = {"Content-Type": "application/json"} | ({"Content-Length": "2000"} if announced else {})
    response = send(app, GENERATIONS, content=chunks(), headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "body"
    assert "1000 bytes" in response.json()["error"]["message"]
    assert sum(sent) == (0 if announced else 1100)


def test_a_404_names_the_served_model_even_a_path(app):
    """A 404 names the model that is served also where it is a path."""
    app.state.images_service._model_names = ["/srv/models/emoji.v1"]
    response = post(app, {**GOOD, "model": "/opt/models/sd.v3"})
    assert response.status_code == 404
    for name in ("/opt/models/sd.v3", "/srv/models/emoji.v1"):
        assert name in response.json()["error"]["message"]


def test_work_cancelled_before_it_begins_reaches_no_engine(app, engine):
    service = app.state.images_service

    async def run():
        engine.behave = lambda request: asyncio.sleep(60)
        work = service._calls.start(service._front_end.resolve("a cat", DiffusionParams(n=2)), "a")
        work.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert work.cancelled()

    asyncio.run(run())
    assert sorted(engine.cancelled) == sorted(engine.requests)
