"""Edits through a real `vllm serve` of a random-weight LongCat-Image-Edit, by the example's client."""

import pytest
from PIL import Image

from examples.vllm_server import VllmServer
from tests.e2e.conftest import START_TIMEOUT_S
from tests.e2e.endings import end_amid_a_request
from tests.e2e.scripts import flags, run, run_failing
from tests.families import picture

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server(edit_model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    with VllmServer(edit_model, ["--cfg-parallel-size", "2"], log) as server:
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


def test_nothing_is_left_behind(server, tmp_path):
    """The last test here: it ends the server."""
    picture(48, 48).save(tmp_path / "bear.png")
    slow = {"prompt": "a", "guidance_scale": "4", "num_inference_steps": "200"}
    files = {"image": ("bear.png", (tmp_path / "bear.png").read_bytes(), "image/png")}
    end_amid_a_request(server, "SIGINT", "/v1/images/edits", data=slow, files=files)
