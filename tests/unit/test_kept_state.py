"""A video goes on from what was kept of it: the same latents as if nothing had happened."""

import msgspec
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tests.toy_pipeline import ToyPipeline, toy_request
from tests.unit.test_runner import join, make_runner, plan
from vllm_cfg_plugin.engine.plan import KEPT, Admission, Assign
from vllm_cfg_plugin.params import StepCache
from vllm_cfg_plugin.worker.kept_state import KEEP_EVERY_STEPS

STEPS = 2 * KEEP_EVERY_STEPS + 2
NOISE_SCHEDULERS = {
    "of several steps": lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "that draws noise": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
}


class VideoPipeline(ToyPipeline):
    """With diffusers' noise schedulers."""

    def __init__(self, make):
        super().__init__()
        self._make = make

    def make_noise_scheduler(self, request):
        scheduler = self._make()
        scheduler.set_timesteps(request.num_inference_steps)
        return scheduler

    def step_latents(self, scheduler, noise_pred, *arguments):
        """Of small predictions: beside large latents the noise of a step would vanish."""
        return super().step_latents(scheduler, noise_pred.clamp(-1, 1), *arguments)


def video(frames=5, cache=None):
    return msgspec.structs.replace(toy_request(steps=STEPS, seed=3), num_frames=frames, cache=cache)


def run(runner, first, steps):
    """Latents after each of the last so many steps."""
    request, latents = first.admit[0].request, []
    for number in range(steps):
        owners = (0,) * request.branches_at(STEPS - steps + number)
        changes = first if number == 0 else plan(number)
        runner.run(msgspec.structs.replace(changes, assign=[Assign(0, owners)]))
        latents.append(runner.states[0].latents)
    return latents


@pytest.mark.parametrize("cache", [None, StepCache(interval=4, order=1), StepCache(interval=3, negative_only=True)])
@pytest.mark.parametrize("make", NOISE_SCHEDULERS.values(), ids=NOISE_SCHEDULERS)
def test_a_video_goes_on_where_it_was_kept(make, cache):
    """A video goes on where it was kept, amid spared steps too: its history is kept with it."""
    runner = make_runner(VideoPipeline(make))
    whole = run(runner, join([video(cache=cache)]), STEPS)
    kept_steps = [report.shape for report in runner.side.take() if report.branch == KEPT]
    assert kept_steps == [(KEEP_EVERY_STEPS,), (2 * KEEP_EVERY_STEPS,)]
    for (steps,), frame in zip(kept_steps, runner.side.kept, strict=True):
        first = join([video()])
        first.admit[0] = Admission(0, video(cache=cache), bytes(frame.numpy()))
        resumed = run(make_runner(VideoPipeline(make)), first, STEPS - steps)
        assert torch.equal(torch.stack(resumed), torch.stack(whole[steps:]))


def test_images_are_not_kept():
    runner = make_runner(ToyPipeline())
    run(runner, join([video(frames=1)]), STEPS)
    assert runner.side.kept == []


def test_a_video_that_cannot_be_kept_costs_nobody_anything():
    class Unkept(VideoPipeline):
        def make_noise_scheduler(self, request):
            scheduler = super().make_noise_scheduler(request)
            scheduler.sampler = lambda: None
            return scheduler

    runner = make_runner(Unkept(NOISE_SCHEDULERS["of several steps"]))
    failed = runner.run(join([video(), video(frames=1)])).failed
    for number in range(1, STEPS):
        failed += runner.run(plan(number)).failed
    assert failed == []
    assert runner.side.kept == []
    assert [state.index for state in runner.states.values()] == [STEPS] * 2
