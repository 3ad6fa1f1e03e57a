"""Previews: when they are planned, what they show, and that they change nothing of the image."""

import msgspec
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler

from tests.toy_pipeline import InlineSideWork, ToyPipeline, toy_request
from tests.unit.test_batching import LONG, PlayedRanks, long_batch, play, run_plan
from vllm_cfg_plugin.config import new_address
from vllm_cfg_plugin.engine.batching import StepBatch
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.plan import DECODED, PREVIEWED, Admission, Assign, Decode, Encode, Preview, StepPlan
from vllm_cfg_plugin.engine.progress import Preview as PublishedPreview
from vllm_cfg_plugin.engine.progress import Progress, ProgressPublisher, ProgressSubscriber, address_of_client
from vllm_cfg_plugin.worker.estimate import estimated_final_latents
from vllm_cfg_plugin.worker.runner import StepRunner


def previewed(count, **fields):
    return msgspec.structs.replace(toy_request(**fields), previews=count)


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(20, 0, ()), (20, 1, (4,)), (20, 3, (4, 8, 12)), (3, 3, (1,)), (4, 3, (1, 2)), (2, 3, (1,)), (1, 3, ())],
)
def test_the_first_preview_is_taken_within_a_third_of_the_steps(steps, count, expected):
    points = previewed(count, steps=steps).preview_steps
    assert points == expected
    assert not points or points[0] <= max(1, steps / 3)


@pytest.mark.parametrize("delay", [0, 2])
def test_previews_are_planned_for_who_asked_and_for_nobody_else(delay):
    batch, ranks = StepBatch(2, 8, 10**6, UNCALIBRATED), PlayedRanks(2, delay)
    play(batch, ranks, [(0, previewed(3, steps=20)), (3, toy_request(steps=20)), (5, previewed(1, steps=10))])
    first, second = ([step for id, step in ranks.previewed if id == asked] for asked in (0, 2))
    assert (first, second) == ([4, 8, 12], [2])
    assert not batch.awaits_side_work


def test_a_preview_waits_until_the_one_before_it_is_back():
    batch, ranks = StepBatch(1, 8, 10**6, UNCALIBRATED), PlayedRanks(1, delay=6)
    play(batch, ranks, [(0, previewed(3, steps=20))])
    assert [step for _, step in ranks.previewed] == [4, 11, 18]


def test_a_long_request_has_previews():
    batch, ranks = long_batch(max_tokens=300), PlayedRanks(2)
    request = batch.add("long", 0, previewed(2, steps=5, image_tokens=LONG))
    assert request.is_long
    play(batch, ranks, [])
    assert ranks.previewed == [(0, 1), (0, 2)]


def test_a_restart_of_ranks_repeats_no_preview_that_is_back():
    batch, ranks = StepBatch(1, 8, 10**6, UNCALIBRATED), PlayedRanks(1)
    request = batch.add("a", 0, previewed(2, steps=10))
    while request.made_previews < 1:
        run_plan(batch, ranks)
    batch.start_over(has_killed=True)
    again = PlayedRanks(1)
    play(batch, again, [])
    assert again.previewed == [(0, 4)]


def steps_until(batch, ranks, request):
    """Steps of the engine from a request's first to its last."""
    taken = 0
    while request.request_id in {other.request_id for other in batch.all_requests()}:
        planned, decoded = run_plan(batch, ranks)
        taken += bool(planned.running)
        for done in decoded:
            batch.finish(done)
    return taken


def test_who_streams_gives_the_time_of_its_previews_back():
    cost = msgspec.structs.replace(UNCALIBRATED, decode_us=12, decode_token_us=0)
    batch, ranks = StepBatch(2, 8, 10**6, cost), PlayedRanks(2)
    neighbour = batch.add("neighbour", 0, toy_request(steps=40))
    streaming = batch.add("streaming", 0, previewed(3, steps=20))
    assert sum(streaming.costs) // 2 == 6, "what a step without it spares the other: half of what a preview takes"
    assert steps_until(batch, ranks, streaming) == 20 + 3 * 2
    assert [step for _, step in ranks.previewed] == [4, 8, 12]
    assert ranks.steps[neighbour.id] >= 20 + 3 * 2, "it never rests"


@pytest.mark.parametrize("others", [[], [previewed(1, steps=40)]], ids=["alone", "beside another one that streams"])
def test_who_streams_rests_for_nobody(others):
    cost = msgspec.structs.replace(UNCALIBRATED, decode_us=3000)
    batch, ranks = StepBatch(2, 8, 10**6, cost), PlayedRanks(2)
    for number, spec in enumerate(others):
        batch.add(f"other-{number}", 0, spec)
    assert steps_until(batch, ranks, batch.add("streaming", 0, previewed(3, steps=20))) == 20


def run_to_the_end(request, previews=(), pipeline=None):
    """(reports, images, final latents) of a request that one rank runs, with a preview after each of these steps."""
    runner = StepRunner(pipeline or ToyPipeline(), 0, 1, lambda row: row.unsqueeze(0), InlineSideWork(0))
    encodes = [Encode(0, branch, 0) for branch in range(len(request.prompts))]
    runner.run(StepPlan(0, [], [Admission(0, request)], encodes, [Assign(0, (0, 0))], False, []))
    for step in range(1, request.steps + 1):
        runner.run(StepPlan(step, [], [], [], [], True, [], previews=[Preview(0, 0)] if step in previews else []))
    latents = runner.states[0].latents
    runner.run(StepPlan(99, [], [], [], [], False, [Decode(0, 0)]))
    return runner.side.take(), runner.side.images, latents


def test_a_preview_changes_no_bit_of_the_image():
    request = toy_request(steps=6)
    reports, _, latents = run_to_the_end(request, previews=(1, 3))
    assert [report.branch for report in reports] == [0, 1, PREVIEWED, PREVIEWED, DECODED]
    assert torch.equal(latents, run_to_the_end(request)[2])


def test_a_step_that_is_sat_out_changes_no_bit_of_the_image():
    runner = StepRunner(ToyPipeline(), 0, 1, lambda row: row.unsqueeze(0), InlineSideWork(0))
    request, other = toy_request(steps=4), toy_request("another", None, steps=9)
    admissions = [Admission(0, request), Admission(1, other)]
    encodes = [Encode(0, 0, 0), Encode(0, 1, 0), Encode(1, 0, 0)]
    runner.run(StepPlan(0, [], admissions, encodes, [Assign(0, (0, 0)), Assign(1, (0,))], True, []))
    runner.run(StepPlan(1, [], [], [], [Assign(0, None)], True, []))
    runner.run(StepPlan(2, [], [], [], [], True, []))
    for step in range(3, 6):
        runner.run(StepPlan(step, [], [], [], [Assign(0, (0, 0))] if step == 3 else [], True, []))
    assert (runner.states[0].index, runner.states[1].index) == (4, 6)
    assert torch.equal(runner.states[0].latents, run_to_the_end(request)[2])


def test_a_preview_that_fails_is_no_failure_of_its_request():
    class Unlucky(ToyPipeline):
        decodes = 0

        def decode(self, latents, request, condition=()):
            self.decodes += 1
            if self.decodes == 1:
                raise RuntimeError("no luck")
            return super().decode(latents, request, condition)

    reports, _, _ = run_to_the_end(toy_request(steps=4), previews=(1,), pipeline=Unlucky())
    assert [(report.branch, bool(report.error)) for report in reports[2:]] == [(PREVIEWED, True), (DECODED, False)]


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_certain_model_shows_the_image_from_the_first_step(scheduler):
    """A model that knows the image shows it from the first step."""
    image, noise = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    scheduler.set_timesteps(6)
    latents = noise
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = noise - image  # of the straight way between them
        estimate = estimated_final_latents(scheduler, velocity, index, latents)
        torch.testing.assert_close(estimate, image, atol=2e-2, rtol=0)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]


def test_other_noise_schedulers_show_their_noisy_latents():
    latents = torch.randn(1, 4, 8)
    assert estimated_final_latents(object(), torch.ones(1, 4, 8), 0, latents) is latents


def test_updates_reach_their_client_whenever_it_listens():
    """Updates reach the client they are for whenever it begins to listen."""
    prefix, pixels = new_address("progress"), bytes(range(12))
    publisher = ProgressPublisher(prefix)
    publisher.publish(1, Progress("a", 1, 3))
    publisher.publish(1, PublishedPreview("a", 0, (1, 2, 2, 3)), memoryview(pixels))
    publisher.publish(0, Progress("b", 2, 3))
    with ProgressSubscriber(address_of_client(prefix, 1)) as mine:
        received = []
        while len(received) < 2:
            received += mine.poll(1000)
    publisher.close()
    (progress, nothing), (preview, shown) = received
    assert (progress, nothing) == (Progress("a", 1, 3), None)
    assert preview == PublishedPreview("a", 0, (1, 2, 2, 3))
    assert (shown.shape, shown.tobytes()) == ((1, 2, 2, 3), pixels)
