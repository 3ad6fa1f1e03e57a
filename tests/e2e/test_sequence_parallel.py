"""`vllm serve` with two cfg ranks of two processes each: the bytes of one process, also when one dies or hangs."""

import base64
import io
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
from PIL import Image

from benchmarks.endurance import processes
from examples.vllm_server import VllmServer
from tests.contract import generate, make_request
from tests.e2e.conftest import START_TIMEOUT_S
from tests.families import load
from tests.model_builders.qwen_image import build_qwen_image

pytestmark = pytest.mark.e2e

FLAGS = ["--cfg-parallel-size", "2", "--sequence-parallel-size", "2", "--cfg-step-timeout", "4"]
# (width, height, steps, scale)
ASKED = [(64, 64, 60, 4.0), (128, 64, 40, 1.0), (256, 256, 30, 3.0), (64, 96, 80, 2.0)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_qwen_image(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    routes_of_sleep = {"VLLM_SERVER_DEV_MODE": "1"}
    with VllmServer(model, FLAGS, tmp_path_factory.mktemp("group") / "server.log", routes_of_sleep) as server:
        server.wait_ready(START_TIMEOUT_S)
        yield server


def draw(server: VllmServer, number: int) -> np.ndarray:
    width, height, steps, scale = ASKED[number]
    body = {"prompt": f"a house, number {number}", "size": f"{width}x{height}", "num_inference_steps": steps}
    body |= {"seed": number, "true_cfg_scale": scale, "negative_prompt": "ugly"}
    answer = requests.post(f"{server.url}/v1/images/generations", json=body, timeout=120)
    assert answer.ok, answer.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))


@pytest.fixture(scope="module")
def expected(model) -> list[np.ndarray]:
    """What one process makes of them, in this one."""
    pipeline, images = load(model), []
    for number, (width, height, steps, scale) in enumerate(ASKED):
        size = {"width": width, "height": height, "num_inference_steps": steps}
        guidance = {"true_cfg_scale": scale, "negative_prompt": "ugly", "seed": number}
        request = make_request(model, f"a house, number {number}", **size, **guidance)
        images.append(pipeline.decode(generate(pipeline, request), request)[0].numpy())
    return images


def draw_all(server: VllmServer, meanwhile=lambda: None) -> list[np.ndarray]:
    with ThreadPoolExecutor(len(ASKED)) as pool:
        answers = [pool.submit(draw, server, number) for number in range(len(ASKED))]
        time.sleep(0.2)
        meanwhile()
        return [answer.result() for answer in answers]


def test_four_processes_make_the_images_of_one(server, expected):
    assert {title for title in processes(server) if title.startswith("CfgRank")} == {
        "CfgRank0.0",
        "CfgRank0.1",
        "CfgRank1.0",
        "CfgRank1.1",
    }
    assert all(np.array_equal(*pair) for pair in zip(draw_all(server), expected, strict=True))


@pytest.mark.parametrize(("title", "number"), [("CfgRank1.1", signal.SIGKILL), ("CfgRank0.1", signal.SIGSTOP)])
def test_a_second_process_that_dies_or_hangs_loses_nothing(server, expected, title, number):
    images = draw_all(server, lambda: processes(server)[title].send_signal(number))
    assert all(np.array_equal(*pair) for pair in zip(images, expected, strict=True))


def test_a_server_that_slept_has_all_its_processes_again(server, expected):
    assert requests.post(f"{server.url}/sleep?level=1&mode=keep", timeout=60).ok
    assert not [title for title in processes(server) if title.startswith("CfgRank")]
    assert requests.post(f"{server.url}/wake_up", timeout=60).ok
    assert np.array_equal(draw(server, 0), expected[0])
