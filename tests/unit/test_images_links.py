"""Images under links: what a client gets, and how long the file is there."""

import io
import re

import pytest
from PIL import Image

from tests.unit.http_app import GENERATIONS, FakeEngine, get, make_app, send
from vllm_cfg_plugin.entrypoints.images.links import ImageLinks


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def app(monkeypatch, folder):
    return make_app(FakeEngine(), monkeypatch)


def test_a_link_leads_to_the_image(app):
    body = {"prompt": "a cat", "seed": 5, "n": 2, "output_format": "webp"}
    answer = send(app, GENERATIONS, json={**body, "response_format": "url"}).json()
    assert all(set(image) == {"url", "seed", "metrics"} for image in answer["data"])
    first, second = (image["url"] for image in answer["data"])
    assert first != second
    assert re.fullmatch(r"http://test/images/[\w-]{43}\.webp", first)
    file = get(app, first)
    assert (file.status_code, file.headers["content-type"]) == (200, "image/webp")
    assert Image.open(io.BytesIO(file.content)).size == (64, 64)
    assert get(app, first, method="HEAD").headers["content-length"] == str(len(file.content))
    assert get(app, first, headers={"Range": "bytes=0-3"}).content == file.content[:4]


@pytest.mark.parametrize("name", ["", "x.png", "%2e%2e/passwd", "A" * 43 + ".png"])
def test_other_links_lead_nowhere(app, name):
    answer = get(app, f"http://test/images/{name}")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("NotFoundError", 404)
    assert "expired" in error["message"]


def test_servers_of_one_name_share_files_and_leave_none(folder):
    """Servers of one name find each other's files and leave none."""
    one, two = ImageLinks("name"), ImageLinks("name")
    name = one.add(b"file", "png")
    assert two.find(name).read_bytes() == b"file"
    assert ImageLinks("other").find(name) is None
    two.add(b"another", "png")
    del one
    assert two.find(name) is None
    del two
    assert list(folder.iterdir()) == []


def test_files_expire(folder, monkeypatch):
    links = ImageLinks("name", keep_seconds=10)
    name = links.add(b"file", "png")
    assert links.find(name) is not None
    later = links._now() + 11
    links._now = lambda: later
    assert links.find(name) is None
    assert list(folder.glob("*/*")) == []


def test_the_oldest_files_go_when_they_are_too_many(folder):
    links = ImageLinks("name", max_bytes=10)
    names = [links.add(bytes(6), "png") for _ in range(2)]
    assert [links.find(name) is None for name in names] == [True, False]
