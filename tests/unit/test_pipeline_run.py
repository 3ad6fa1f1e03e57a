"""A pipeline's own call, step by step: what the denoiser is asked, in which parts, and what becomes of the answers."""

import copy
import inspect
import threading
import time

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vllm_cfg_plugin.pipelines.any_pipeline import calls
from vllm_cfg_plugin.pipelines.any_pipeline.call_thread import watched
from vllm_cfg_plugin.pipelines.any_pipeline.calls import Denoiser
from vllm_cfg_plugin.pipelines.any_pipeline.run import PipelineRun

STEPS, SCALE = 4, 3.0
TEXTS = torch.tensor([[1.0, 2.0], [-0.5, 0.25]])  # of the positive and of the negative branch


class Model(torch.nn.Module):
    """Counts its forwards; `mixes` lets the rows of a batch see each other."""

    def __init__(self, mixes=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[0.5, -0.25], [0.1, 0.3]]), requires_grad=False)
        self.mixes, self.rows = mixes, []

    def forward(self, sample, text, return_dict=False):
        if isinstance(sample, list):
            return ([Model.forward(self, *each)[0] for each in zip(sample, text, strict=True)],)
        self.rows.append(sample.shape[0])
        out = torch.tanh(sample @ self.weight + text)
        return (out - out.mean(dim=0) if self.mixes else out,)


class Pipeline:
    """As diffusers' are: a model, a noise scheduler, and a loop of one of several kinds."""

    def __init__(self, kind, mixes=False):
        self.kind, self.model, self.scheduler = kind, Model(mixes), FlowMatchEulerDiscreteScheduler()
        self.decoded = 0

    def __call__(self, steps=STEPS):
        self.scheduler.set_timesteps(steps)
        latents = torch.ones(1, 2)
        for index, t in enumerate(self.scheduler.timesteps):
            latents = self.scheduler.step(self.predict(latents, index), t, latents)[0]
        self.decoded += 1
        return latents * 2

    def predict(self, latents, index):
        one, other = TEXTS[:1], TEXTS[1:]
        if self.kind == "list":
            one, other = self.model([latents, latents], [one, other])[0]
            return other + SCALE * (one - other)
        if self.kind == "views":  # as where an image lies behind the latents
            one, other = (self.model(latents, text)[0][:, :2].unsqueeze(0) for text in (one, other))
            return (other + SCALE * (one - other)).squeeze(0)
        if self.kind == "batch":
            one, other = self.model(torch.cat([latents] * 2), TEXTS)[0].chunk(2)
            return other + SCALE * (one - other)
        positive = self.model(latents, one)[0]
        if self.kind == "unguided" or (self.kind == "ends early" and index >= 2):
            return positive
        if self.kind == "depends":
            latents = latents + 0.1 * positive
        if self.kind == "in place":
            latents = latents.mul_(0.9)
        negative = self.model(latents, other)[0]
        guided = negative + SCALE * (positive - negative)
        if self.kind == "more later" and index >= 2:
            guided = guided + self.model(latents, one + other)[0]
        return guided


def start(kind, steps=STEPS, branches=2, mixes=False, **own):
    pipeline = Pipeline(kind, mixes)
    denoiser = Denoiser("transformer", pipeline.model)
    pipeline.scheduler.__class__ = watched(type(pipeline.scheduler))
    vars(pipeline).update(own)
    run = PipelineRun(lambda: pipeline, {"steps": STEPS}, steps, branches, torch.device("cpu"))
    return pipeline, denoiser, run


def drive(run, steps=STEPS, branches=2):
    """As one rank does that has all branches."""
    with torch.inference_mode():
        run.begin()
        for _ in range(steps):
            run.step(torch.stack([run.predict(branch) for branch in range(branches)]))
        return run.finish()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "cfg-pipeline-call"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


@pytest.mark.parametrize(
    "kind", ["in a row", "batch", "list", "views", "unguided", "ends early", "more later", "depends", "in place"]
)
def test_a_run_gives_what_the_plain_call_gives(kind):
    expected = Pipeline(kind)()
    _, _, run = start(kind)
    assert torch.allclose(drive(run), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["in a row", "batch", "list", "views"])
def test_each_branch_has_a_part_of_its_own(kind):
    pipeline, _, run = start(kind)
    with torch.inference_mode():
        run.begin()
        pipeline.model.rows.clear()  # it has seen what a call returns
        both = [run.predict(branch) for branch in range(2)]
        assert pipeline.model.rows == [1, 1]
        assert run.width == 2
        assert not torch.equal(*both)
        run.step(torch.stack(both))
        assert pipeline.model.rows == [1, 1]  # and the next step's calls are not forwarded yet


def test_what_has_no_room_in_the_exchange_is_forwarded_here():
    pipeline, _, run = start("more later")
    with torch.inference_mode():
        run.begin()
        for _ in range(2):
            run.step(torch.stack([run.predict(branch) for branch in range(2)]))
        predictions = torch.stack([run.predict(branch) for branch in range(2)])
        pipeline.model.rows.clear()
        run.step(predictions)
        assert pipeline.model.rows == [1]
    assert run.width == 2


def test_rows_that_see_each_other_stay_in_one_batch(caplog):
    expected = Pipeline("batch", mixes=True)()
    pipeline, _, run = start("batch", mixes=True)
    calls.logger.addHandler(caplog.handler)
    try:
        assert torch.equal(drive(run), expected)
    finally:
        calls.logger.removeHandler(caplog.handler)
    assert "can't be cut into its 2 branches" in caplog.text
    assert pipeline.model.rows[-STEPS:] == [2] * STEPS


def test_it_pauses_before_it_decodes():
    pipeline, _, run = start("in a row")
    with torch.inference_mode():
        run.begin()
        for _ in range(STEPS):
            run.step(torch.stack([run.predict(branch) for branch in range(2)]))
        assert pipeline.decoded == 0
        assert torch.equal(run.finish(), run.latents * 2)
    assert pipeline.decoded == 1


def test_a_pipeline_may_take_fewer_steps_than_the_engine():
    pipeline, _, run = start("in a row", steps=STEPS + 2, _num_timesteps=STEPS)
    with torch.inference_mode():
        run.begin()
        for _ in range(STEPS + 2):
            run.step(torch.stack([run.predict(branch) for branch in range(2)]))
        assert pipeline.decoded == 0
        assert torch.equal(run.finish(), Pipeline("in a row")())


def test_a_pipeline_may_take_more_steps_than_the_engine():
    _, _, run = start("in a row", steps=STEPS - 1)
    assert torch.equal(drive(run, STEPS - 1), Pipeline("in a row")())


def test_what_the_pipeline_raises_is_raised_by_its_driver():
    pipeline, _, run = start("in a row")
    pipeline.predict = lambda latents, index: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.begin()


def test_a_run_that_nobody_needs_ends_its_thread():
    pipeline, _, run = start("in a row")
    run.begin()
    assert len(threads()) == 1
    del run
    assert pipeline.decoded == 0  # and the fixture sees that the thread ends


def test_outside_of_a_run_nothing_has_changed():
    pipeline, denoiser, _ = start("in a row")
    assert torch.equal(pipeline(), Pipeline("in a row")())
    assert list(inspect.signature(denoiser.module.forward).parameters) == ["sample", "text", "return_dict"]


def test_a_watched_scheduler_is_of_its_class_and_can_be_copied():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.__class__ = watched(FlowMatchEulerDiscreteScheduler)
    own = copy.deepcopy(scheduler)
    own.set_timesteps(2)
    assert isinstance(own, FlowMatchEulerDiscreteScheduler)
    assert type(own).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert "generator" in inspect.signature(own.step).parameters
    own.step(torch.ones(1), own.timesteps[0], torch.ones(1))
    assert scheduler.step_index is None
