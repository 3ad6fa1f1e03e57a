"""The step loop on one rank: requests join and leave, and one request's failure is its own."""

import queue
import time

import msgspec
import pytest
import torch

from tests.toy_pipeline import (
    UNLUCKY_HOOKS,
    InlineSideWork,
    ToyNoiseScheduler,
    ToyPipeline,
    UnluckyPipeline,
    toy_request,
)
from vllm_cfg_plugin.engine.plan import (
    DECODED,
    FORWARDED,
    Admission,
    Assign,
    Decode,
    Encode,
    Forward,
    StepPlan,
)
from vllm_cfg_plugin.params import COMBINE_RULES, ImageInput
from vllm_cfg_plugin.pipelines.base import PromptEmbeds, generator_of
from vllm_cfg_plugin.worker.runner import StepRunner
from vllm_cfg_plugin.worker.side_work import SideWork


def make_runner(pipeline, rank=0, ranks=1, all_gather=lambda row: row.unsqueeze(0)):
    return StepRunner(pipeline, rank, ranks, all_gather, InlineSideWork(rank))


@pytest.fixture
def pipeline():
    return ToyPipeline()


@pytest.fixture
def runner(pipeline):
    return make_runner(pipeline)


def plan(
    step=0, retire=(), admit=(), encodes=(), assign=(), advance=True, decodes=(), long_steps=(), forwards=(), embeds=()
):
    lists = [list(changes) for changes in (retire, admit, encodes, assign)]
    return StepPlan(step, *lists, advance, list(decodes), list(long_steps), list(forwards), embeds=list(embeds))


def join(requests, owners=None):
    """The first plan of requests that all start at once, on rank 0 if nothing else is said."""
    owners = owners or [(0,) * len(request.prompts) for request in requests]
    return plan(
        admit=[Admission(id, request) for id, request in enumerate(requests)],
        encodes=[Encode(id, branch, rank) for id, ranks in enumerate(owners) for branch, rank in enumerate(ranks)],
        assign=[Assign(id, ranks) for id, ranks in enumerate(owners)],
    )


def run_to_the_end(runner, requests):
    """All requests, of one number of steps, from their first step to their image; all failures of steps."""
    steps = requests[0].num_inference_steps
    failed = runner.run(join(requests)).failed
    for step in range(1, steps):
        decodes = [Decode(id, 0) for id in range(len(requests))] if step == steps - 1 else []
        failed += runner.run(plan(step, decodes=decodes)).failed
    return failed


def test_a_request_runs_from_noise_to_image_and_is_forgotten(runner):
    assert not run_to_the_end(runner, [toy_request()])
    assert [(r.id, r.error) for r in runner.side.take() if r.branch == DECODED] == [(0, "")]
    assert not runner.states


def test_a_plan_without_changes_is_one_more_step_of_all(runner):
    """A plan without changes takes one more step of everybody who runs."""
    runner.run(join([toy_request(steps=3), toy_request(steps=5)]))
    assert [state.index for state in runner.states.values()] == [1, 1]
    runner.run(plan(1))
    runner.run(plan(2))
    runner.run(plan(3))
    assert [state.index for state in runner.states.values()] == [3, 4], "the first one ran three steps and no more"
    runner.run(plan(4, advance=False))
    assert [state.index for state in runner.states.values()] == [3, 4]


def test_a_prompt_is_encoded_once_however_many_requests_bring_it(runner, pipeline):
    run_to_the_end(runner, [toy_request("a cat"), toy_request("a dog"), toy_request("a cat", seed=5)])
    assert sorted(pipeline.encoded) == ["", "a cat", "a dog"]


def test_a_rank_encodes_only_what_it_is_told_to(pipeline):
    runner = make_runner(pipeline, 1, 2, lambda row: torch.stack([row, row]))
    runner.run(join([toy_request("a cat", "blurry")], [(0, 1)]))
    assert pipeline.encoded == ["blurry"]


def test_a_moved_branch_is_forwarded_by_the_new_rank_alone(pipeline):
    """A branch that changes ranks is forwarded by the new one alone."""
    counts = []
    pipeline.transformer.fail = lambda sequences: counts.append(len(sequences))
    runner = make_runner(pipeline, 0, 2, lambda row: torch.stack([row, row]))
    first = join([toy_request(steps=9)], [(0, 1)])
    runner.run(first)
    runner.run(plan(1, encodes=[Encode(0, 1, 0)], assign=[Assign(0, (0, 0))]))
    runner.run(plan(2, assign=[Assign(0, (1, 1))]))
    assert counts == [1, 2], "one branch, then both, then none"


def test_a_retired_request_leaves_nothing_behind(runner):
    runner.run(join([toy_request()]))
    runner.run(plan(1, retire=[0]))
    assert not runner.states


def latents_after_one_step(requests, fail=None):
    pipeline = ToyPipeline()
    if fail is not None:
        pipeline.transformer.fail = fail
    runner = make_runner(pipeline)
    report = runner.run(join(requests))
    return report, {id: state.latents for id, state in runner.states.items()}


def test_a_failing_text_encoder_is_reported_beside_the_steps(runner):
    requests = [toy_request("a cat"), toy_request("unencodable"), toy_request("a dog")]
    whole = join(requests)
    runner.run(plan(admit=whole.admit, encodes=whole.encodes, advance=False))
    errors = {report.id: report.error for report in runner.side.take() if report.error}
    assert list(errors) == [1]
    assert "no such words" in errors[1]


def test_a_failing_sequence_is_found_and_fails_its_request_alone():
    def fail(sequences):
        if any(sequence.latents.shape[1] == 9 for sequence in sequences):
            raise ValueError("nine is unlucky")

    requests = [toy_request("a cat"), toy_request("bad", image_tokens=9), toy_request("a dog")]
    report, latents = latents_after_one_step(requests, fail)
    assert [id for id, _ in report.failed] == [1]
    assert sorted(latents) == [0, 2], "what failed is dropped at the exchange that all ranks shared"
    assert torch.equal(latents[0], latents_after_one_step([requests[0]])[1][0])
    assert torch.equal(latents[2], latents_after_one_step([requests[2]])[1][0])


@pytest.mark.parametrize("unlucky", sorted(UNLUCKY_HOOKS - {"encode_images"}))
def test_a_hook_that_fails_costs_its_request_alone(unlucky):
    requests = [toy_request("a cat"), toy_request(unlucky), toy_request("a dog")]
    runner = make_runner(UnluckyPipeline())
    failed = runner.run(join(requests)).failed + runner.run(plan(1)).failed + runner.run(plan(2)).failed
    assert [id for id, _ in failed] == [1]
    assert sorted(runner.states) == [0, 2]
    for id in (0, 2):
        alone = make_runner(ToyPipeline())
        for step in (join([requests[id]]), plan(1), plan(2)):
            alone.run(step)
        assert torch.equal(runner.states[id].latents, alone.states[0].latents)


def test_a_batch_out_of_memory_is_split_and_nobody_fails():
    """A batch that runs out of memory is split and nobody fails."""
    sizes = []

    def fail(sequences):
        sizes.append(len(sequences))
        if len(sequences) > 2:
            raise torch.OutOfMemoryError("too many")

    requests = [toy_request(f"cat {i}", seed=i) for i in range(4)]
    report, latents = latents_after_one_step(requests, fail)
    assert not report.failed
    assert max(sizes) == 8
    for id, request in enumerate(requests):
        assert torch.equal(latents[id], latents_after_one_step([request])[1][0])


def test_noise_that_can_t_be_drawn_fails_its_request_alone(runner, pipeline):
    """Noise that can't be drawn fails its request alone and only once."""
    draw = pipeline.draw_noise
    pipeline.draw_noise = lambda request, generator: draw(request, generator) if request.seed else 1 / 0
    report = runner.run(join([toy_request(seed=0), toy_request(seed=1)]))
    assert [id for id, _ in report.failed] == [0]
    assert list(runner.states) == [1]
    report = runner.run(plan(1, assign=[Assign(0, (0, 0))], decodes=[Decode(0, 0)]))
    assert report.failed == [], "plans that were made before the engine knew are carried out without it"
    assert runner.run(plan(2, retire=[0])).failed == []


def test_latents_that_are_not_finite_are_an_error(runner, pipeline):
    """Latents that are not finite are an error and no black picture."""
    pipeline.draw_noise = lambda request, generator: torch.full((1, 4, 4), float("nan"))
    run_to_the_end(runner, [toy_request()])
    (report,) = [report for report in runner.side.take() if report.branch == DECODED]
    assert "not finite" in report.error


def test_overridden_hooks_act_in_the_engine():
    class Loud(ToyPipeline):
        def predict_noise(self, **kwargs):
            return 2 * super().predict_noise(**kwargs)

        def step_latents(self, *step):
            return super().step_latents(*step) + 1

    runner = make_runner(Loud())
    request = toy_request(negative=None)
    runner.run(join([request]))
    noise = ToyPipeline().draw_noise(request, generator_of(request))
    expected = noise - 0.1 * (2 * (noise * 1 + float(len("a cat")))) + 1
    assert torch.allclose(runner.states[0].latents, expected)


def test_a_loop_hook_alone_is_refused():
    """A loop hook alone is refused because the engine would not call it."""

    class OwnLoop:
        def scheduler_step(self, noise_pred, t, latents):
            return latents

    with pytest.raises(TypeError, match=r"Half overrides scheduler_step.* and not step_latents"):
        type("Half", (OwnLoop, ToyPipeline), {})
    type("Both", (OwnLoop, ToyPipeline), {"step_latents": lambda self, *step: step[3]})


def test_a_drawing_noise_scheduler_gets_the_generator(pipeline):
    """A noise scheduler that draws gets the request's generator."""

    class Noisy(ToyNoiseScheduler):
        def step(self, noise, t, latents, generator=None, return_dict=False):
            return (torch.randn(latents.shape, generator=generator),)

    pipeline.make_noise_scheduler = lambda request: Noisy(request.num_inference_steps)
    requests = [toy_request(seed=seed, steps=2) for seed in (1, 2)]
    runner = make_runner(pipeline)
    runner.run(join(requests))
    runner.run(plan())
    for id, request in enumerate(requests):
        generator = generator_of(request)
        *_, last = (torch.randn(1, 4, 4, generator=generator) for _ in range(3))
        assert torch.equal(runner.states[id].latents, last)


def test_outside_the_guidance_interval_positive_goes_alone(runner, pipeline):
    """Steps outside the guidance interval take the positive branch alone."""
    request = toy_request(steps=3, scale=4.0, interval=(0.0, 0.4))  # one step of three
    runner.run(join([request]))
    runner.run(plan(assign=[Assign(0, (0,))]))
    latents = pipeline.draw_noise(request, generator_of(request))
    for step, timestep in enumerate(pipeline.make_noise_scheduler(request).timesteps[:2]):
        positive, negative = latents * timestep + float(len("a cat")), latents * timestep
        noise = negative + 4.0 * (positive - negative) if step == 0 else positive
        latents = latents - 0.1 * timestep * noise
    assert torch.allclose(runner.states[0].latents, latents)


def test_a_pipeline_may_combine_more_than_two_branches():
    class ThreeBranches(ToyPipeline):
        guidance_fields = frozenset()

        def combine_branches(self, predictions, request, timestep, step):
            positive, negative, empty = predictions
            return empty + 2 * (negative - empty) + 3 * (positive - negative)

    request = toy_request(negative=["no", ""], steps=1)
    runner = make_runner(ThreeBranches())
    runner.run(join([request]))
    noise = ToyPipeline().draw_noise(request, generator_of(request))
    expected = noise - 0.1 * (noise + 2 * float(len("no")) + 3 * float(len("a cat") - len("no")))
    assert torch.allclose(runner.states[0].latents, expected)


def test_branches_of_different_models_make_a_forward_each(pipeline):
    class TwoExperts(ToyPipeline):
        def __init__(self):
            super().__init__()
            self.forwards = []

        def forward_group(self, branch):
            return bool(branch.timestep > 0.5)

        def pack_branches(self, branches):
            self.forwards.append([(branch.request.seed, float(branch.timestep)) for branch in branches])
            return super().pack_branches(branches)

    pipeline = TwoExperts()
    runner = make_runner(pipeline)
    few, many = toy_request(steps=2, seed=1), toy_request(steps=9, seed=2)
    runner.run(join([few, many]))
    runner.run(plan())
    first, *second = pipeline.forwards
    assert sorted(seed for seed, _ in first) == [1, 1, 2, 2]
    assert sorted([seed for seed, _ in group] for group in second) == [[1, 1], [2, 2]]
    for request in (few, many):
        alone = make_runner(ToyPipeline())
        alone.run(join([request]))
        alone.run(plan())
        (state,) = [state for state in runner.states.values() if state.request == request]
        assert torch.equal(state.latents, alone.states[0].latents)


def test_only_cfg_zero_star_starts_with_zeros(pipeline):
    """Cfg zero star starts with a step of zeros and other rules do not."""
    for rule in COMBINE_RULES:
        runner = make_runner(ToyPipeline())
        request = toy_request(steps=2, rule=rule)
        runner.run(join([request]))
        assert torch.equal(runner.states[0].latents, pipeline.draw_noise(request, generator_of(request))) == (
            rule == "cfg_zero_star"
        )


def test_images_are_encoded_once_for_all_branches():
    """Images are encoded once for all branches and reach the forward."""

    class WithImages(ToyPipeline):
        def __init__(self):
            super().__init__()
            self.seen = []

        def encode_images(self, request):
            self.seen.append([image.digest for image in request.images])
            return super().encode_images(request)

        def pack_branches(self, branches):
            assert [float(value) for branch in branches for value in branch.condition] == [3.0, 3.0]
            return super().pack_branches(branches)

    request = msgspec.structs.replace(toy_request(), images=[ImageInput("red", "RGB", 1, 1, b"\x03\x00\x00")])
    pipeline = WithImages()
    runner = make_runner(pipeline)
    assert not run_to_the_end(runner, [request])
    assert pipeline.seen == [["red"]]


def test_images_are_encoded_anew_for_another_shape(runner, pipeline):
    """Some families bring the images to the size of the result, or fill them up to its frames."""
    seen = []
    pipeline.encode_images = lambda request: seen.append((request.height, request.width, request.num_frames)) or []
    image = ImageInput("red", "RGB", 1, 1, b"\x03\x00\x00")
    sizes = [(2, 2, 1), (4, 2, 1), (2, 4, 1), (2, 2, 5), (2, 2, 1)]
    requests = [
        msgspec.structs.replace(toy_request(), images=[image], height=height, width=width, num_frames=frames)
        for height, width, frames in sizes
    ]
    runner.run(join(requests))
    assert seen == sizes[:4]


def test_every_branch_is_given_the_images(runner, pipeline):
    seen = {}
    pack = pipeline.pack_branches

    def record(branches):
        seen.update({branch.branch: len(branch.condition) for branch in branches})
        return pack(branches)

    pipeline.pack_branches = record
    pipeline.combine_branches = lambda predictions, *args: predictions[0]
    image = ImageInput("red", "RGB", 1, 1, b"\x03\x00\x00")
    request = msgspec.structs.replace(toy_request(), images=[image], prompts=["a", "b", "c"], text_tokens=[1, 1, 1])
    assert not runner.run(join([request])).failed
    assert seen == {0: 1, 1: 1, 2: 1}


def test_a_request_whose_last_step_fails_is_not_decoded(runner, pipeline):
    def fail(*args):
        raise ArithmeticError("no last step")

    runner.run(join([toy_request(steps=2)]))
    pipeline.step_latents = fail
    report = runner.run(plan(1, decodes=[Decode(0, 0)]))
    assert [id for id, _ in report.failed] == [0]
    assert [side for side in runner.side.take() if side.branch == DECODED] == []


# ---- long requests ----


def forward_and_step(runner, steps, owners=(0, 0), first=1, **last):
    """So many steps of request 0, each forwarded beside the steps; all failures."""
    failed = []
    for step in range(first, first + steps):
        failed += runner.run(plan(step, advance=False, forwards=[Forward(0, owners)])).failed
        is_last = step == first + steps - 1
        failed += runner.run(plan(step, advance=False, long_steps=[0], **(last if is_last else {}))).failed
    return failed


def prepared(pipeline, requests, owners=None, **ranks):
    """A runner that has encoded the texts of all, and stepped nobody."""
    runner = make_runner(pipeline, **ranks)
    whole = join(requests, owners)
    runner.run(plan(admit=whole.admit, encodes=whole.encodes, advance=False))
    runner.side.take()
    return runner


def test_beside_the_steps_latents_are_bitwise_equal():
    """Forwarded beside the steps a request takes the same steps bit by bit."""
    requests = [toy_request(steps=3, interval=(0.0, 0.7)), toy_request("a dog", steps=9, seed=1)]
    alone = make_runner(ToyPipeline())
    alone.run(join(requests[:1]))
    alone.run(plan(1, assign=[Assign(0, (0, 0))]))
    alone.run(plan(2, assign=[Assign(0, (0,))]))
    runner = prepared(ToyPipeline(), requests)
    runner.run(plan(assign=[Assign(1, (0, 0))], forwards=[Forward(0, (0, 0))]))
    assert [(report.id, report.branch) for report in runner.side.take()] == [(0, FORWARDED)]
    runner.run(plan(1))
    assert [state.index for state in runner.states.values()] == [0, 2], "its prediction is kept until it shall step"
    runner.run(plan(2, long_steps=[0], forwards=[Forward(0, (0, 0))]))
    runner.run(plan(3, long_steps=[0], forwards=[Forward(0, (0,))]))
    runner.run(plan(4, long_steps=[0]))
    assert [state.index for state in runner.states.values()] == [3, 5]
    assert torch.equal(runner.states[0].latents, alone.states[0].latents)
    assert runner.states[0].predictions == {}
    runner.run(plan(5))
    assert [state.index for state in runner.states.values()] == [3, 6], "it is no running request"


def test_a_long_requests_last_step_comes_with_its_decode():
    """The last step of a long request and its decode come in one plan."""
    runner = prepared(ToyPipeline(), [toy_request(steps=2)])
    assert not forward_and_step(runner, 2, decodes=[Decode(0, 0, is_long=True)])
    assert [(r.branch, r.error) for r in runner.side.take() if r.branch == DECODED] == [(DECODED, "")]
    assert not runner.states


def test_a_rank_forwards_its_own_long_branches_alone():
    """A rank forwards its own branches of a long request alone."""
    pipeline, counts = ToyPipeline(), []
    pipeline.transformer.fail = lambda sequences: counts.append([sequence.branch for sequence in sequences])
    everywhere = {"rank": 1, "ranks": 2, "all_gather": lambda row: torch.stack([row, row])}
    runner = prepared(pipeline, [toy_request(steps=3)], [(1, 1)], **everywhere)
    for owners in ((1, 0), (0, 1), (0, 0)):
        runner.run(plan(advance=False, forwards=[Forward(0, owners)]))
        assert sorted(runner.states[0].predictions) == [branch for branch, owner in enumerate(owners) if owner == 1]
        runner.run(plan(advance=False, long_steps=[0]))
    assert counts == [[0], [1]]


@pytest.mark.parametrize("error", [ValueError("out of luck"), torch.OutOfMemoryError("too large")])
def test_a_long_forward_that_fails_is_reported_beside_the_steps(error):
    pipeline = ToyPipeline()
    runner = prepared(pipeline, [toy_request(), toy_request("a dog", steps=9)])

    def fail(sequences):
        if sequences[0].request.prompts[0] == "a cat":
            raise error

    pipeline.transformer.fail = fail
    report = runner.run(plan(assign=[Assign(1, (0, 0))], forwards=[Forward(0, (0, 0))]))
    assert not report.failed
    (side,) = runner.side.take()
    assert (side.id, side.branch) == (0, FORWARDED)
    assert str(error) in side.error
    runner.run(plan(1, retire=[0]))
    assert [state.index for state in runner.states.values()] == [2]


def test_a_step_without_prediction_fails_its_request_alone():
    """A step without a prediction fails its request alone instead of using zeros."""
    runner = prepared(ToyPipeline(), [toy_request(), toy_request("a dog", steps=9)])
    runner.run(plan(assign=[Assign(1, (0, 0))], forwards=[Forward(0, (0, 0))]))
    runner.states[0].predictions.clear()
    assert [id for id, _ in runner.run(plan(1, long_steps=[0])).failed] == [0]
    assert list(runner.states) == [1]


def test_plans_go_on_without_a_long_request_that_failed(pipeline):
    """Plans for a long request that failed are carried out without it."""
    runner = prepared(pipeline, [toy_request()])
    pipeline.combine_branches = lambda *args: 1 / 0
    assert [id for id, _ in forward_and_step(runner, 1)] == [0]
    runner.run(plan(2, advance=False, forwards=[Forward(0, (0, 0))]))
    assert [report.branch for report in runner.side.take()] == [FORWARDED], "the one before it failed"
    runner.run(plan(3, advance=False, long_steps=[0]))
    assert not runner.states, "the other ranks learn of it in the exchange"
    assert not runner.run(plan(4, advance=False, long_steps=[0], forwards=[Forward(0, (0, 0))])).failed


@pytest.mark.parametrize(("cache_bytes", "encodes"), [(1, 5), (2**20, 2)])
def test_texts_are_cached_as_far_as_there_are_bytes(cache_bytes, encodes):
    pipeline, encoded = ToyPipeline(), []
    pipeline.encode_branch = lambda request, branch: encoded.append(branch) or PromptEmbeds(torch.zeros(1, 3))
    runner = StepRunner(pipeline, 0, 1, lambda row: row.unsqueeze(0), InlineSideWork(0), cache_bytes=cache_bytes)
    texts = ["a", "a", "b", "a", "b", "a"]
    runner.run(join([msgspec.structs.replace(toy_request(text), prompts=[text], text_tokens=[1]) for text in texts]))
    assert len(encoded) == encodes


def test_texts_are_encoded_one_at_a_time():
    """Tokenizers fail when two threads use them."""
    pipeline, inside, together = ToyPipeline(), [], []

    def encode(request, branch):
        inside.append(branch)
        together.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return PromptEmbeds(torch.zeros(1, 3))

    pipeline.encode_branch = encode
    side, reports = SideWork(0, torch.device("cpu")), queue.Queue()
    side.deliver = lambda report, pixels: reports.put(report)
    runner = StepRunner(pipeline, 0, 1, lambda row: row.unsqueeze(0), side)
    whole = join([toy_request("a"), toy_request("b")])
    encodes = [Encode(e.id, e.branch, e.rank, is_long=e.id == 1) for e in whole.encodes]
    runner.run(plan(admit=whole.admit, encodes=encodes, advance=False))
    assert [reports.get(timeout=10).error for _ in encodes] == [""] * 4
    assert set(together) == {1}
    side.close()


@pytest.mark.parametrize("shape", [None, 4, (4.0, 3), (2, "a"), (-1, 4), [4, 3]])
def test_a_shape_that_is_none_fails_its_request_before_it_steps(shape):
    class Shapeless(ToyPipeline):
        def prediction_shape(self, request):
            return shape if request.prompts[0] == "unlucky" else super().prediction_shape(request)

    runner = make_runner(Shapeless())
    admitted = join([toy_request("unlucky"), toy_request()])
    report = runner.run(plan(admit=admitted.admit, encodes=admitted.encodes, advance=False))
    assert [id for id, _ in report.failed] == [0]
    assert "prediction_shape returned" in report.failed[0][1]
    assert runner.run(plan(1, retire=[0], assign=[admitted.assign[1]])).failed == []
