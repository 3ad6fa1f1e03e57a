"""What popular applications send, as their sources have it: each is served, unchanged."""

import base64
import io

import pytest
from PIL import Image

from tests.unit.edits import CAT, DOG, EDIT_INFO
from tests.unit.fakes import INFO
from tests.unit.http_app import EDITS, GENERATIONS, FakeEngine, make_app, send

GENERATED = {
    "open-webui": {"model": "alias", "prompt": "a cat", "n": 1, "size": "64x64", "response_format": "b64_json"},
    "open-webui, gpt-image": {"model": "alias", "prompt": "a cat", "n": 1},
    "LibreChat": {
        "model": "alias",
        "prompt": "a cat",
        "n": 1,
        "background": "auto",
        "output_format": "png",
        "quality": "auto",
        "size": "auto",
    },
    "LibreChat, webp": {
        "model": "alias",
        "prompt": "a cat",
        "background": "auto",
        "output_format": "webp",
        "output_compression": 100,
    },
    "LibreChat, DALL-E": {
        "model": "alias",
        "prompt": "a cat",
        "n": 1,
        "quality": "standard",
        "style": "vivid",
        "size": "64x64",
    },
    "LiteLLM": {
        "model": "alias",
        "prompt": "a cat",
        "n": None,
        "quality": None,
        "response_format": None,
        "size": None,
        "style": None,
        "user": None,
        "extra_body": {"metadata": {"user_api_key": "hash"}},
    },
    "LiteLLM, drop_params": {"model": "alias", "prompt": "a cat", "user": "me", "metadata": {"team": "x"}},
    "n8n": {"prompt": "a cat", "model": "alias", "response_format": "b64_json", "quality": "hd", "style": "natural"},
    "n8n, gpt-image": {"prompt": "a cat", "model": "alias", "n": 1, "quality": "medium", "size": "64x64"},
    "LangChain": {
        "model": "alias",
        "prompt": "a cat",
        "n": 1,
        "size": "64x64",
        "response_format": "b64_json",
        "style": "vivid",
        "quality": "standard",
        "user": None,
    },
    "LobeChat": {"model": "alias", "prompt": "a cat", "size": "64x64", "watermark": False},
}


@pytest.mark.parametrize("name", GENERATED)
def test_a_generation_is_served(monkeypatch, name):
    app = make_app(FakeEngine(), monkeypatch, INFO)
    answer = send(app, f"{GENERATIONS}?api-version=2025-04-01-preview", json=GENERATED[name])
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert image.size == (64, 64)


@pytest.mark.parametrize("name", ["n8n", "LangChain"])
def test_a_link_is_served(monkeypatch, tmp_path, name):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    app = make_app(FakeEngine(), monkeypatch, INFO)
    answer = send(app, GENERATIONS, json={**GENERATED[name], "response_format": "url"})
    assert answer.json()["data"][0]["url"].startswith("http://test/images/")


FILE = ("image.png", CAT, "image/png")
EDITED = {
    "open-webui": ({"model": "alias", "prompt": "a hat", "n": "1", "size": "64x64"}, [("image[]", FILE)]),
    "open-webui, one image": ({"model": "alias", "prompt": "a hat", "response_format": "b64_json"}, [("image", FILE)]),
    "LibreChat": (
        {"model": "alias", "prompt": "a hat", "quality": "auto", "size": "auto"},
        [("image[]", FILE), ("image[]", ("second", DOG, "image/webp"))],
    ),
    "LiteLLM": ({"model": "alias", "prompt": "a hat", "n": "1", "user": "me"}, [("image", FILE), ("image", FILE)]),
    "n8n": (
        {"model": "alias", "prompt": "a hat", "n": "1", "quality": "high", "input_fidelity": "low"},
        [("image[]", FILE)],
    ),
}


@pytest.mark.parametrize("name", EDITED)
def test_an_edit_is_served(monkeypatch, name):
    app = make_app(FakeEngine(), monkeypatch, EDIT_INFO)
    fields, files = EDITED[name]
    answer = send(app, EDITS, data=fields, files=files)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["b64_json"]
