"""POST /v1/images/edits in front of a fake engine: forms as OpenAI's clients write them, tasks, cancellation."""

import asyncio
import base64
import io
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.unit.edits import CAT, DOG, EDIT_INFO, LAYERED_INFO, assert_refused, edit
from tests.unit.fakes import IMAGE_TO_VIDEO_INFO
from tests.unit.http_app import EDITS, GENERATIONS, FakeEngine, ask, decode, disconnect_mid_denoise, make_app, send
from vllm_cfg_plugin.entrypoints import service as serving
from vllm_cfg_plugin.params import StepCache


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def app(engine, monkeypatch):
    return make_app(engine, monkeypatch, EDIT_INFO)


@pytest.mark.parametrize(
    "image",
    [
        CAT,
        io.BytesIO(CAT),
        ("cat.png", CAT),
        ("cat", CAT, "application/octet-stream"),
        ("cat.jpg", CAT, "image/jpeg"),  # which it is not
        [CAT],
    ],
    ids=["bytes", "file", "tuple", "octet-stream", "wrong type", "list"],
)
def test_the_official_client_sends_an_image(app, engine, image):
    response = ask(app, lambda client: client.images.edit(image=image, prompt="a hat", extra_body={"seed": 5}))
    (request,) = engine.requests.values()
    (sent,) = request.images
    assert (sent.mode, sent.width, sent.height) == ("RGB", 16, 8)
    assert np.array_equal(
        np.frombuffer(sent.pixels, np.uint8).reshape(8, 16, 3), np.asarray(Image.open(io.BytesIO(CAT)))
    )
    assert request.prompts == ["a hat"]
    assert (response.background, response.output_format, response.size) == ("opaque", "png", "64x64")
    assert response.usage.input_tokens_details.image_tokens == request.condition_tokens == 2
    assert response.usage.input_tokens == 5 + 5 + 2
    assert decode(response.data[0].b64_json).size == (64, 64)


def test_the_official_client_sends_every_field(app, engine):
    response = ask(
        app,
        lambda client: client.images.edit(
            image=[("cat.png", CAT), DOG],
            prompt="a hat",
            model="emoji",
            n=2,
            size="96x64",
            background="auto",
            input_fidelity="high",
            output_format="webp",
            output_compression=90,
            partial_images=0,
            quality="auto",
            response_format="b64_json",
            stream=False,
            user="me",
            extra_body={
                "seed": 3,
                "negative_prompt": "",
                "num_inference_steps": 7,
                "true_cfg_scale": 2.5,
                "guidance_interval": [0.25, 1],
                "guidance_rescale": 0.5,
                "cfg_normalize": True,
                "combine_rule": "apg",
                "cache": "static",
                "cache_interval": 3,
                "cache_range": [0.5, 1],
            },
        ),
    )
    requests = list(engine.requests.values())
    assert [request.seed for request in requests] == [3, 4]
    for request in requests:
        assert [(image.width, image.height) for image in request.images] == [(16, 8), (8, 8)]
        assert request.prompts == ["a hat", ""]
        assert (request.width, request.height, request.num_inference_steps) == (96, 64, 7)
        guidance = request.guidance
        assert (guidance.scale, guidance.interval, guidance.rescale) == (2.5, (0.25, 1.0), 0.5)
        assert (guidance.normalize, guidance.rule) == (True, "apg")
        assert request.cache == StepCache(interval=3, range=(0.5, 1.0))
    assert (response.output_format, response.size, len(response.data)) == ("webp", "96x64", 2)
    assert decode(response.data[0].b64_json).format == "WEBP"


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


@pytest.mark.parametrize(
    "images",
    [
        {"images": [{"image_url": data_url(CAT)}, {"image_url": data_url(DOG)}]},
        {"images": [data_url(CAT), data_url(DOG)]},
        {"image": [{"image_url": {"url": data_url(CAT)}}, data_url(DOG)]},
    ],
)
def test_images_in_a_json_body(app, engine, images):
    response = send(app, EDITS, json={"prompt": "a hat", "seed": 5, **images})
    assert response.status_code == 200, response.text
    (request,) = engine.requests.values()
    assert [(image.width, image.height) for image in request.images] == [(16, 8), (8, 8)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "image"),
        ({"images": []}, "images"),
        ({"images": [{"file_id": "file-1"}]}, "images[0]"),
        ({"images": [{"image_url": "https://example.com/cat.png"}]}, "images[0]"),
        ({"images": [{"image_url": data_url(CAT)}, {"image_url": data_url(b"no image")}]}, "images[1]"),
        ({"image": data_url(b"no image")}, "image"),
        ({"images": [data_url(CAT)], "n": "2"}, "n"),
        ({"images": [data_url(CAT)], "image": data_url(CAT)}, "image"),
        ({"images": [data_url(CAT)], "mask": {"image_url": data_url(CAT)}}, "mask"),
    ],
)
def test_a_wrong_json_body_names_the_field(app, engine, fields, param):
    assert_refused(send(app, EDITS, json={"prompt": "a hat", **fields}), param)
    assert engine.requests == {}


def test_a_body_as_the_javascript_client_writes_it(app, engine):
    parts = [
        b'name="image[]"; filename="cat.png"\r\nContent-Type: application/octet-stream\r\n\r\n' + CAT,
        b'name="image[]"; filename="unknown_file"\r\nContent-Type: application/octet-stream\r\n\r\n' + DOG,
        'name="prompt"\r\n\r\nun chapeau d\'été'.encode(),
        b'name="n"\r\n\r\n1',
        b'name="stream"\r\n\r\nfalse',
        b'name="quality"\r\n\r\nnull',  # how this client wants a null written
        b'name="size"\r\n\r\n',
        b'name="guidance_interval[]"\r\n\r\n0',
        b'name="guidance_interval[]"\r\n\r\n0.5',
        b'name="extra_body[seed]"\r\n\r\n9',
        b'name="extra_body[negative_prompt]"\r\n\r\nnull',  # a text like any other
    ]
    body = b"".join(b"--xyz\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--xyz--\r\n"
    response = send(app, EDITS, content=body, headers={"Content-Type": "multipart/form-data; boundary=xyz"})
    assert response.status_code == 200, response.text
    (request,) = engine.requests.values()
    assert request.prompts == ["un chapeau d'été", "null"]
    assert (request.seed, request.guidance.interval) == (9, (0.0, 0.5))
    assert [(image.width, image.height) for image in request.images] == [(16, 8), (8, 8)]


@pytest.mark.parametrize("names", [("image", "image"), ("image[0]", "image[1]"), ("image[]", "image[]")])
def test_several_images_keep_their_order(app, engine, names):
    response = edit(app, files=list(zip(names, [("a", CAT), ("b", DOG)], strict=True)))
    assert response.status_code == 200, response.text
    (request,) = engine.requests.values()
    assert [image.width for image in request.images] == [16, 8]


def test_empty_values_are_defaults_but_of_negative_prompts(app, engine):
    empty = dict.fromkeys(["n", "size", "seed", "mask", "stream", "output_compression", "user", "true_cfg_scale"], "")
    assert edit(app, {**empty, "negative_prompt": ""}).status_code == 200
    assert next(iter(engine.requests.values())).prompts == ["a hat", ""]


def test_a_text_to_image_model_names_the_endpoint(engine, monkeypatch):
    assert_refused(edit(make_app(engine, monkeypatch)), "image", "text-to-image", GENERATIONS)


def test_a_video_model_names_the_endpoint(engine, monkeypatch):
    assert_refused(edit(make_app(engine, monkeypatch, IMAGE_TO_VIDEO_INFO)), "model", "image-to-video", "/v1/videos")


def test_a_model_with_optional_images_serves_both_endpoints(engine, monkeypatch):
    app = make_app(engine, monkeypatch, replace(EDIT_INFO, min_images=0))
    assert edit(app).status_code == 200
    assert send(app, GENERATIONS, json={"prompt": "a hat"}).status_code == 200
    assert [len(request.images) for request in engine.requests.values()] == [1, 0]


def test_a_wrong_model_is_a_404(app):
    assert edit(app, {"model": "gpt-image-1"}).status_code == 404


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_a_layered_image_is_one_entry_per_layer(engine, monkeypatch, image_format):
    app = make_app(engine, monkeypatch, LAYERED_INFO)
    response = edit(app, {"layers": "3", "n": "2", "background": "transparent", "output_format": image_format})
    assert response.status_code == 200, response.text
    body = response.json()
    assert [image["seed"] for image in body["data"]] == [5, 5, 5, 6, 6, 6]
    assert len({image["b64_json"] for image in body["data"]}) == 6
    assert {decode(image["b64_json"]).mode for image in body["data"]} == {"RGBA"}
    assert body["background"] == "transparent"
    assert [request.layers for request in engine.requests.values()] == [3, 3]


def test_images_are_decoded_off_the_event_loop(app, monkeypatch):
    threads = []
    read = serving.read_image
    monkeypatch.setattr(serving, "read_image", lambda *args: threads.append(threading.get_ident()) or read(*args))
    assert edit(app).status_code == 200
    assert threads != [threading.get_ident()]


def test_a_disconnect_aborts_all_images(app, engine):
    body = b""
    for name, value in (("prompt", b"a hat"), ("n", b"2"), ("seed", b"5")):
        body += b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value)
    body += b'--x\r\nContent-Disposition: form-data; name="image"; filename="cat.png"\r\n\r\n' + CAT + b"\r\n--x--\r\n"
    disconnect_mid_denoise(app, engine, EDITS, "multipart/form-data; boundary=x", body)
    assert len(engine.requests) == len(engine.cancelled) == 2


def test_a_disconnect_during_the_upload_runs_nothing(app, engine):
    messages = [{"type": "http.request", "body": b"--x\r\n", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    async def ignore(message):
        pass

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": EDITS, "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, ignore))
    assert engine.requests == {}


def test_the_documentation_describes_the_form(app):
    operation = app.openapi()["paths"][EDITS]["post"]
    schema = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "prompt", "mask", "size", "true_cfg_scale"} <= set(schema["properties"])
    assert set(schema["required"]) == {"image", "prompt"}
