"""Pipelines that run as diffusers' own, in the step loop of one rank: cancelled, failing, and beside each other."""

import gc
import threading
import time

import pytest
import torch

from tests.contract import make_request
from tests.families import load
from tests.model_builders.any_pipeline import build
from tests.unit.test_runner import make_runner, plan
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.plan import Admission, Assign, Decode, Encode
from vllm_cfg_plugin.pipelines.registry import describe
from vllm_cfg_plugin.worker.call_calibration import calibrate_calls

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return build("StableDiffusionPipeline", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def runner(folder):
    return make_runner(load(folder))


@pytest.fixture
def ask(folder):
    def ask(**params):
        return make_request(folder, "a cat", height=32, width=32, num_inference_steps=STEPS, **params)

    return ask


def join(*requests):
    """Each is prepared as a whole, as branch 0."""
    return plan(
        admit=[Admission(id, request) for id, request in enumerate(requests)],
        encodes=[Encode(id, 0, 0) for id in range(len(requests))],
        assign=[Assign(id, (0,) * len(request.prompts)) for id, request in enumerate(requests)],
    )


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "cfg-pipeline-call"]


def wait_for_threads(count):
    gc.collect()  # a failure's traceback may hold a request of an earlier test
    deadline = time.monotonic() + 5
    while len(threads()) != count and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(threads())


def test_a_cancelled_request_leaves_no_thread(runner, ask):
    runner.run(join(ask(seed=1), ask(seed=2)))
    assert wait_for_threads(2) == 2
    runner.run(plan(1, retire=[0]))
    assert wait_for_threads(1) == 1
    runner.run(plan(2, retire=[1], advance=False))
    assert wait_for_threads(0) == 0


def test_a_rank_that_does_not_decode_ends_the_thread(runner, ask):
    request = ask(seed=1)
    runner.run(join(request))
    for step in range(1, request.steps):
        runner.run(plan(step))
    assert wait_for_threads(1) == 1
    runner.run(plan(request.steps, advance=False, decodes=[Decode(0, 1)]))  # by another rank
    assert wait_for_threads(0) == 0


def test_a_failing_forward_is_one_requests_own(runner, ask):
    """The denoiser fails for one request's numbers; the other's image is what it is alone."""
    first, second = ask(seed=1), ask(seed=2)
    runner.run(join(first, second))
    run = runner.states[0].noise_scheduler
    run.predict = lambda branch: 1 / 0
    report = runner.run(plan(1))
    assert [id for id, _ in report.failed] == [0]
    for step in range(2, second.steps):
        assert not runner.run(plan(step, retire=[0] if step == 2 else [])).failed
    runner.run(plan(second.steps, advance=False, decodes=[Decode(1, 0)]))
    beside = runner.side.images[1]

    alone = make_runner(runner.pipeline)
    alone.run(join(second))
    for step in range(1, second.steps):
        alone.run(plan(step))
    alone.run(plan(second.steps, advance=False, decodes=[Decode(0, 0)]))
    assert torch.equal(alone.side.images[0], beside)


def test_its_cost_is_measured_by_whole_requests(folder):
    info = describe(Checkpoint(str(folder)))
    calibration = calibrate_calls(load(folder), info)
    assert calibration.default_tokens == info.image_tokens(64, 64)
    assert calibration.token_budget == 2 * calibration.default_tokens
    assert calibration.cost.forward(256) > 1
    assert calibration.cost.encode(0) > 1
    assert calibration.cost.decode(256) > 1
    assert wait_for_threads(0) == 0


def test_a_pipeline_that_makes_no_sample_is_served_all_the_same(folder, monkeypatch):
    info, pipeline = describe(Checkpoint(str(folder))), load(folder)

    def refuse(request, branch):
        raise ValueError("not today")

    monkeypatch.setattr(pipeline, "encode_branch", refuse)
    calibration = calibrate_calls(pipeline, info)
    assert calibration.cost == UNCALIBRATED
    assert calibration.token_budget > 0
