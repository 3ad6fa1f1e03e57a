"""Adapters over HTTP: how requests name them, and how they come and go while the server runs."""

import io
from dataclasses import replace

import pytest
from openai import BadRequestError, NotFoundError
from PIL import Image
from safetensors.torch import save_file

from tests.unit.fakes import INFO, LIMITS
from tests.unit.http_app import EDITS, GENERATIONS, FakeEngine, ask, make_app, send
from vllm_cfg_plugin.entrypoints.adapters import Adapters
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd
from vllm_cfg_plugin.params import LoRA

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
NAMED = {name: LoRA(name, f"/adapters/{name}.safetensors", f"key of {name}") for name in ("pixel", "ink")}


class Engine(FakeEngine):
    """Its ranks answer `problem` when they are to read an adapter."""

    problem = ""

    async def collective_rpc(self, method, args=()):
        if method == "add_adapter":
            self.read = args
            return [self.problem] * 2
        return await super().collective_rpc(method)


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def app(engine, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = make_app(engine, monkeypatch)
    front_end = FrontEnd(INFO, LIMITS, len, adapters=Adapters(NAMED, 2))
    app.state.images_service._front_end = front_end
    app.state.adapters = front_end.adapters
    return app


def carried(engine):
    """What the engine's last request carries."""
    return [(lora.name, lora.scale) for lora in [*engine.requests.values()][-1].lora]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"model": "emoji"}, []),
        ({"model": "pixel"}, [("pixel", 1.0)]),
        ({"lora": "ink"}, [("ink", 1.0)]),
        ({"lora": [{"name": "ink", "scale": -0.5}, {"name": "pixel"}]}, [("ink", -0.5), ("pixel", 1.0)]),
        ({"model": "pixel", "lora": {"name": "ink", "scale": 2}}, [("pixel", 1.0), ("ink", 2.0)]),
    ],
)
def test_a_request_names_adapters(app, engine, fields, expected):
    assert send(app, GENERATIONS, json={"prompt": "a cat", "size": "64x64", **fields}).status_code == 200
    assert carried(engine) == expected


def test_the_official_client_names_them(app, engine):
    async def use(client):
        listed = [(model.id, getattr(model, "parent", None)) async for model in await client.models.list()]
        assert listed == [("emoji", None), ("alias", None), ("pixel", "emoji"), ("ink", "emoji")]
        assert (await client.models.retrieve("ink")).root == "/adapters/ink.safetensors"
        extra = {"lora": [{"name": "ink", "scale": 0.8}]}
        await client.images.generate(model="pixel", prompt="a cat", size="64x64", extra_body=extra)

    ask(app, use)
    assert carried(engine) == [("pixel", 1.0), ("ink", 0.8)]


@pytest.mark.parametrize(
    ("fields", "error", "param", "message"),
    [
        ({"model": "oil"}, NotFoundError, "model", "emoji, alias, pixel, ink"),
        ({"lora": ["oil"]}, BadRequestError, "lora[0].name", "(pixel, ink)"),
        ({"lora": [{"name": "ink", "scale": 5}]}, BadRequestError, "lora[0].scale", "from -4 to 4"),
        ({"lora": 3}, BadRequestError, "lora", "lora"),
        ({"model": "ink", "lora": ["ink"]}, BadRequestError, "lora", "named twice"),
    ],
)
def test_mistakes(app, engine, fields, error, param, message):
    with pytest.raises(error) as refused:
        ask(app, lambda client: client.images.generate(model="emoji", prompt="a", extra_body=fields))
    assert refused.value.param.startswith(param)
    assert message in refused.value.body["message"]
    assert not engine.requests


def test_a_form_has_it_as_json(app, engine):
    service = app.state.images_service
    service._front_end = replace(service._front_end, info=replace(INFO, max_images=1))
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "png")
    for text, expected in (("ink", [("ink", 1.0)]), ('[{"name": "pixel", "scale": 0.5}]', [("pixel", 0.5)])):
        fields = {"prompt": "a cat", "size": "64x64", "lora": text}
        answer = send(app, EDITS, data=fields, files={"image": ("a.png", file.getvalue())})
        assert answer.status_code == 200, answer.text
        assert carried(engine) == expected


def test_adapters_come_and_go(app, engine, tmp_path):
    path = tmp_path / "chalk.safetensors"
    save_file({}, path)
    answer = send(app, LOAD, json={"lora_name": "chalk", "lora_path": str(path)})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'chalk' added successfully.")
    assert engine.read[:2] == ("chalk", str(path))
    generate = {"prompt": "a cat", "size": "64x64", "model": "chalk"}
    assert send(app, GENERATIONS, json=generate).status_code == 200
    assert carried(engine) == [("chalk", 1.0)]
    again = send(app, LOAD, json={"lora_name": "chalk", "lora_path": str(path)})
    assert again.status_code == 400
    assert "load_inplace" in again.json()["error"]["message"]
    assert send(app, LOAD, json={"lora_name": "chalk", "lora_path": str(path), "load_inplace": True}).status_code == 200
    assert send(app, UNLOAD, json={"lora_name": "chalk"}).status_code == 200
    assert send(app, GENERATIONS, json=generate).status_code == 404
    assert send(app, UNLOAD, json={"lora_name": "chalk"}).status_code == 404


@pytest.mark.parametrize(
    ("name", "file", "problem", "message"),
    [
        ("chalk", "gone.safetensors", "", "there is no file or folder"),
        ("chalk", "chalk.bin", "", "is a pickle, which is not loaded"),
        ("chalk", "chalk.safetensors", "adapter 'chalk' does not fit: it has rank 99", "it has rank 99"),
        ("emoji", "chalk.safetensors", "", "another name than the model's own"),
        ("ink", "chalk.safetensors", "", "there is one of that name"),
    ],
)
def test_what_can_not_be_loaded(app, engine, tmp_path, name, file, problem, message):
    save_file({}, tmp_path / "chalk.safetensors")
    (tmp_path / "chalk.bin").write_bytes(b"")
    engine.problem = problem
    answer = send(app, LOAD, json={"lora_name": name, "lora_path": str(tmp_path / file)})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert set(app.state.adapters.named) == set(NAMED)


def test_without_vllms_switch_nothing_is_loaded_at_run_time(engine, monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", raising=False)
    app = make_app(engine, monkeypatch)
    assert send(app, LOAD, json={"lora_name": "a", "lora_path": str(tmp_path)}).status_code == 404


def test_without_enable_lora_nothing_is_loaded(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    answer = send(make_app(engine, monkeypatch), LOAD, json={"lora_name": "a", "lora_path": str(tmp_path)})
    assert answer.status_code == 400
    assert "--enable-lora" in answer.json()["error"]["message"]
