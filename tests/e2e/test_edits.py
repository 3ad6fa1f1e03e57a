"""Edits through a real `vllm serve` of a random-weight LongCat-Image-Edit: the example's client, and applications."""

import io
import json

import pytest
import requests
import schemathesis
from PIL import Image
from schemathesis import GenerationMode

from examples.vllm_server import VllmServer
from tests.e2e.conftest import START_TIMEOUT_S
from tests.e2e.endings import end_amid_a_request
from tests.e2e.scripts import flags, run, run_failing
from tests.families import picture
from tests.openapi_checks import check_answers
from tests.unit.test_client_payloads import EDITED

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server(edit_model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    (edit_model / "generation_config.json").write_text(json.dumps({"num_inference_steps": 2}))  # applications say none
    options = ["--cfg-parallel-size", "2", "--served-model-name", "editor", "alias"]
    with VllmServer(edit_model, options, log) as server:
        server.wait_ready(START_TIMEOUT_S)
        yield server


def test_the_client_edits_images(server, tmp_path):
    picture(48, 48).save(tmp_path / "bear.png")
    asked = {"url": f"{server.url}/v1", "prompt": "snow", "guidance_scale": 4.0, "num_inference_steps": 4}
    arguments = flags(**asked, image="bear.png", output="snow.png")
    assert "saved snow.png" in run("openai_client.py", *arguments, cwd=tmp_path)
    printed = run_failing("openai_client.py", *flags(**asked, output="nothing.png"), cwd=tmp_path)
    assert Image.open(tmp_path / "snow.png").size == (1024, 1024)
    assert "/v1/images/edits" in printed


@pytest.mark.parametrize("name", EDITED)
def test_what_applications_send_is_served(server, name):
    fields, ((field, _), *_) = EDITED[name]  # this model takes one image, and makes sides that are multiples of 64
    picture(64, 64).save(file := io.BytesIO(), "png")
    files = [(field, ("image.png", file.getvalue(), "image/png"))]
    answer = requests.post(f"{server.url}/v1/images/edits", data=fields, files=files, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["b64_json"]


@pytest.mark.parametrize("mode", GenerationMode)
def test_answers_are_as_described(server, mode):
    check_answers(schemathesis.openapi.from_url(f"{server.url}/openapi.json"), mode, examples=4)


def test_nothing_is_left_behind(server, tmp_path):
    """The last test here: it ends the server."""
    picture(48, 48).save(tmp_path / "bear.png")
    slow = {"prompt": "a", "guidance_scale": "4", "num_inference_steps": "200"}
    files = {"image": ("bear.png", (tmp_path / "bear.png").read_bytes(), "image/png")}
    end_amid_a_request(server, "SIGINT", "/v1/images/edits", data=slow, files=files)
