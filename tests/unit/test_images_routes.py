"""The HTTP routes in front of a fake engine: the wire format, every refusal, cancellation. No processes, no weights."""

import asyncio
import base64
import io
import json
from argparse import Namespace
from types import SimpleNamespace

import httpx
import msgspec
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from openai import AsyncOpenAI
from PIL import Image
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.v1.engine.exceptions import EngineDeadError

from tests.unit.fakes import INFO, LIMITS, answer, fake_pixels
from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.engine.result import ResultHeader, pack_result
from vllm_cfg_plugin.entrypoints import images
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd
from vllm_cfg_plugin.params import DiffusionRequest

GOOD = {"prompt": "a cat", "seed": 5}


class FakeEngine:
    """`AsyncLLM.encode` as far as the routes use it; `behave` may return a tensor, raise or never return."""

    def __init__(self) -> None:
        self.requests: dict[str, DiffusionRequest] = {}
        self.cancelled: list[str] = []
        self.behave = None
        self.vllm_config = None
        self.errored = False
        self.is_running = True

    async def encode(self, prompt, pooling_params, request_id):
        assert prompt == {"type": "token", "prompt_token_ids": [0]}
        assert pooling_params.task == "plugin"
        request = msgspec.convert(pooling_params.extra_kwargs, DiffusionRequest)
        self.requests[request_id] = request
        try:
            await asyncio.sleep(0)
            tensor = await self.behave(request) if self.behave else answer(request)
        except asyncio.CancelledError:
            self.cancelled.append(request_id)
            raise
        yield SimpleNamespace(request_id=request_id, outputs=SimpleNamespace(data=tensor), finished=True)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def app(engine, monkeypatch):
    monkeypatch.setattr(FrontEnd, "from_vllm_config", lambda config: FrontEnd(INFO, LIMITS, len))
    app = FastAPI()
    init_exception_handler(app)
    plugin = images.ImagesEndpointPlugin()
    plugin.attach_router(app)
    args = Namespace(served_model_name=["emoji", "alias"], model="/models/emoji", log_error_stack=False)
    asyncio.run(plugin.init_state(engine, app.state, args))
    app.state.args = args
    app.state.engine_client = engine
    app.state.server = SimpleNamespace(should_exit=False)
    return app


def post(app, body=None, *, content=None, **client_options):
    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", **client_options) as client:
            data = json.dumps(body).encode() if content is None else content
            return await client.post(
                "/v1/images/generations", content=data, headers={"Content-Type": "application/json"}
            )

    return asyncio.run(send())


def decode(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


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
    async def generate():
        transport = httpx.ASGITransport(app)
        async with AsyncOpenAI(
            base_url="http://test/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx.AsyncClient(transport=transport),
        ) as client:
            return await client.images.generate(
                model="emoji",
                prompt="a cat",
                n=2,
                size="auto",
                response_format="b64_json",
                extra_body={"seed": 3, "num_inference_steps": 4, "negative_prompt": "", "true_cfg_scale": 2.5},
            )

    response = asyncio.run(generate())
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
        ({"prompt": ""}, "prompt"),
        ({"prompt": "   "}, "prompt"),
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
        ({"response_format": "url"}, "response_format"),
        ({"output_compression": 101, "output_format": "webp"}, "output_compression"),
        ({"stream": True}, "stream"),
        ({"partial_images": 1}, "partial_images"),
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
    assert "it must be" in error["message"]
    assert engine.requests == {}
    assert post(app, GOOD).status_code == 200


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff", b"", b'{"n": 1' + b"0" * 5000 + b"}"])
def test_a_body_that_is_no_object_is_a_400(app, content):
    response = post(app, content=content)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_wrong_model_is_a_404(app):
    response = post(app, {**GOOD, "model": "dall-e-3"})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"
    assert "emoji" in response.json()["error"]["message"]


def test_a_failed_request_is_a_500_that_names_it_and_aborts_its_siblings(app, engine):
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


def test_an_engine_stopped_by_its_server_is_a_503(app, engine):
    async def stop(request):
        asyncio.get_running_loop().call_later(0.1, setattr, app.state.server, "should_exit", True)
        raise EngineDeadError

    engine.behave = stop
    assert post(app, GOOD).status_code == 503


def test_a_disconnect_aborts_all_images(app, engine):
    async def disconnect_mid_denoise():
        started = asyncio.Event()

        async def hang(request):
            started.set()
            await asyncio.sleep(60)

        engine.behave = hang
        body = [{"type": "http.request", "body": json.dumps({**GOOD, "n": 2}).encode()}]

        async def receive():
            if body:
                return body.pop()
            await started.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/images/generations",
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
        }
        await app(scope, receive, send)
        for _ in range(20):
            await asyncio.sleep(0)

    asyncio.run(disconnect_mid_denoise())
    assert len(engine.cancelled) == 2
