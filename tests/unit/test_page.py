"""The page at /: what it knows, what it lets a browser do, and that it can be switched off."""

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI

from tests.unit.edits import EDIT_INFO
from tests.unit.fakes import INFO, VIDEO_INFO
from tests.unit.http_app import FakeEngine, get, make_app
from vllm_cfg_plugin.entrypoints.endpoint import DiffusionEndpointPlugin

FILE = Path(__file__).parents[2] / "vllm_cfg_plugin" / "entrypoints" / "page.html"


def info_of(answer):
    return json.loads(re.search(r'<script type="application/json" id="info">(.*?)</script>', answer.text)[1])


@pytest.mark.parametrize("info", [INFO, EDIT_INFO, VIDEO_INFO], ids=["generations", "edits", "videos"])
def test_the_page_knows_the_model(monkeypatch, info):
    answer = get(make_app(FakeEngine(), monkeypatch, info), "http://test/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    known = info_of(answer)
    assert (known["model"], known["task"], known["scale_field"]) == ("emoji", info.task, info.cfg_scale)
    assert known["defaults"]["steps"] == 20
    assert known["max_images"] == info.max_images


def test_scripts_of_nobody_else_run(monkeypatch):
    app = make_app(FakeEngine(), monkeypatch)
    policies = [get(app, "http://test/").headers["content-security-policy"] for _ in range(2)]
    nonces = [re.search(r"script-src 'nonce-(\S+)'", policy)[1] for policy in policies]
    assert nonces[0] != nonces[1]
    assert all("default-src 'none'" in policy for policy in policies)
    assert f'<script nonce="{nonces[0]}">' not in get(app, "http://test/").text


def test_a_models_name_can_t_end_the_script(monkeypatch):
    app = make_app(FakeEngine(), monkeypatch)
    app.state.page_info = {**app.state.page_info, "model": "</script><img src=x onerror=alert(1)>"}
    answer = get(app, "http://test/")
    assert "<img src=x" not in answer.text
    assert info_of(answer)["model"] == "</script><img src=x onerror=alert(1)>"


def test_the_page_takes_nothing_from_elsewhere_and_writes_no_markup():
    text = FILE.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//\w+\.\w+/", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_the_page_can_be_switched_off():
    app = FastAPI()
    app.state.args = Namespace(additional_config={"cfg_page": False})
    DiffusionEndpointPlugin().attach_router(app)
    assert get(app, "http://test/").status_code == 404


def test_a_model_that_takes_the_size_of_its_images_has_no_size_to_begin_with(monkeypatch):
    info = replace(EDIT_INFO, default_size=lambda sizes: (64, 64))
    known = info_of(get(make_app(FakeEngine(), monkeypatch, info), "http://test/"))
    assert "width" not in known["defaults"]


def test_the_page_is_in_the_package():
    setup = (FILE.parents[2] / "setup.py").read_text(encoding="utf-8")
    assert "entrypoints/page.html" in setup
