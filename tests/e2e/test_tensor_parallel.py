"""`vllm serve` and `DiffusionLLM` with ranks that share weights: images in any batch, and who dies."""

import signal

import numpy as np
import pytest

from benchmarks.endurance import processes
from examples.vllm_server import VllmServer
from tests.e2e.conftest import START_TIMEOUT_S
from tests.e2e.test_sequence_parallel import ASKED, draw, draw_all, expected, model  # noqa: F401
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

pytestmark = pytest.mark.e2e

FLAGS = ["--cfg-parallel-size", "2", "--tensor-parallel-size", "2", "--cfg-step-timeout", "4"]


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):  # noqa: F811
    with VllmServer(model, FLAGS, tmp_path_factory.mktemp("tensor") / "server.log") as server:
        server.wait_ready(START_TIMEOUT_S)
        yield server


@pytest.fixture(scope="module")
def alone(server):
    """Each image with nothing else to do."""
    return [draw(server, number) for number in range(len(ASKED))]


def test_images_are_those_of_one_process(server, alone, expected):  # noqa: F811
    assert {title for title in processes(server) if title.startswith("CfgRank")} == {
        "CfgRank0.0",
        "CfgRank0.1",
        "CfgRank1.0",
        "CfgRank1.1",
    }
    differences = [np.abs(one.astype(int) - other).max() for one, other in zip(alone, expected, strict=True)]
    assert max(differences) <= 1, "levels of 255: sums are taken in another order"


def test_an_image_does_not_depend_on_others(server, alone):
    assert all(np.array_equal(*pair) for pair in zip(draw_all(server), alone, strict=True))


def test_a_process_that_dies_loses_nothing(server, alone):
    images = draw_all(server, lambda: processes(server)["CfgRank1.1"].send_signal(signal.SIGKILL))
    assert all(np.array_equal(*pair) for pair in zip(images, alone, strict=True))


def test_offline(server, model, alone):  # noqa: F811
    """Without CFG-Parallel, and with weights that each process loads by itself: only its part of them."""
    width, height, steps, scale = ASKED[0]
    params = DiffusionParams(width=width, height=height, num_inference_steps=steps, true_cfg_scale=scale, seed=0)
    with DiffusionLLM(str(model), tensor_parallel_size=2, cfg_shared_weights=False) as llm:
        (output,) = llm.generate([{"prompt": "a house, number 0", "negative_prompt": "ugly"}], params)
    assert np.array_equal(np.asarray(output.images[0]), alone[0])
