"""A request's cache of steps: which steps it spares, what stands in for them, and who has the time that is freed."""

import msgspec
import pytest
import torch

from tests.contract import generate
from tests.toy_pipeline import ToyPipeline, toy_request
from tests.unit.fakes import INFO
from tests.unit.test_batching import PlayedRanks, play, run_plan
from tests.unit.test_params import resolve
from tests.unit.test_run_ahead import DevicePace, Ranks
from tests.unit.test_runner import join, make_runner, plan
from vllm_cfg_plugin.engine.batching import StepBatch
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.plan import Assign
from vllm_cfg_plugin.engine.prediction import predicted_seconds
from vllm_cfg_plugin.engine.request import ScheduledRequest
from vllm_cfg_plugin.engine.result import ResultHeader, pack_result, unpack_result
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionParams, StepCache
from vllm_cfg_plugin.pipelines.base import generator_of
from vllm_cfg_plugin.pipelines.common.step_cache import complete, extrapolate


def cached(request, **cache):
    return msgspec.structs.replace(request, cache=StepCache(**cache))


def branches(request):
    return [request.branches_at(step) for step in range(request.steps)]


# ---- which steps are computed ----


@pytest.mark.parametrize(
    ("guidance", "cache", "forwarded"),
    [
        ({}, {}, [2, 0, 2, 0, 2, 0, 2, 0]),
        ({}, {"interval": 3}, [2, 0, 0, 2, 0, 0, 2, 0]),
        ({}, {"range": (0.25, 0.75)}, [2, 2, 2, 0, 2, 0, 2, 2]),
        ({}, {"negative_only": True}, [2, 1, 2, 1, 2, 1, 2, 1]),
        ({"negative": None}, {"interval": 4}, [1, 0, 0, 0, 1, 0, 0, 0]),
        ({"interval": (0.375, 0.75)}, {}, [1, 0, 1, 2, 2, 0, 1, 0]),
        ({"interval": (0.0, 0.5)}, {"negative_only": True}, [2, 1, 2, 1, 1, 1, 1, 1]),
        ({"negative": ["", "worst"]}, {"negative_only": True, "interval": 8}, [3, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_which_branches_a_step_forwards(guidance, cache, forwarded):
    """Each so-manieth step of the range, and the first guided one, which finds no negative prediction to go on from."""
    plain = toy_request(steps=8, **guidance)
    request = cached(plain, **cache)
    assert branches(request) == forwarded
    assert [request.branches_needed_at(step) for step in range(8)] == branches(plain)


# ---- what stands in for the others ----


@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_extrapolation_is_exact_for_polynomials_of_its_order(order):
    factors = torch.randn(order + 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(order))

    def curve(step):
        return sum(factor * step**power for power, factor in enumerate(factors)).float()

    points = [(step, curve(step)) for step in (2, 3, 7)[: order + 1]]
    for step in (8, 11):
        torch.testing.assert_close(extrapolate(points, step), curve(step), rtol=1e-5, atol=1e-4)


def test_few_bits_are_extrapolated_in_more():
    points = [(0, torch.tensor([1.0], dtype=torch.bfloat16)), (1, torch.tensor([1.0078125], dtype=torch.bfloat16))]
    far = extrapolate(points, 101)
    assert far.dtype == torch.bfloat16
    assert far.item() == torch.tensor(1 + 101 * 0.0078125).bfloat16().item()


def test_a_history_is_as_long_as_the_order_needs_and_holds_copies():
    request, history = cached(toy_request(steps=9), order=1), {}
    exchanged = torch.zeros(9, 1, 4, 4)
    for step in (0, 2, 4):
        prediction = exchanged[step]
        assert complete(history, request, step, [prediction, prediction])[0] is prediction
    assert [[step for step, _ in points] for points in history.values()] == [[2, 4], [2, 4]]
    assert all(value.untyped_storage().nbytes() == 64 for points in history.values() for _, value in points)


def test_without_a_cache_nothing_is_remembered():
    history, prediction = {}, torch.zeros(1, 4, 4)
    assert complete(history, toy_request(), 0, [prediction, prediction]) == [prediction, prediction]
    assert history == {}


# ---- on ranks ----


def steps_of(request, owners=lambda branch: 0):
    """The plans of one request's steps, its first but for the admission."""
    for step in range(request.steps):
        yield plan(step, assign=[Assign(0, tuple(map(owners, range(request.branches_at(step)))))])


def run_alone(request, runner=None):
    """Latents after each step on one rank."""
    runner, latents = runner or make_runner(ToyPipeline()), []
    for step, changes in enumerate(steps_of(request)):
        if step == 0:
            changes = msgspec.structs.replace(join([request]), assign=changes.assign)
        assert not runner.run(changes).failed
        latents.append(runner.states[0].latents)
    return latents


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_spared_step_combines_what_the_last_ones_predict(order):
    request, pipeline = cached(toy_request(steps=7, scale=4.0), interval=3, order=order), ToyPipeline()
    latents, points = pipeline.draw_noise(request, generator_of(request)), []
    for step, timestep in enumerate(pipeline.make_noise_scheduler(request).timesteps):
        if step % 3 == 0:
            positive, negative = latents * timestep + float(len("a cat")), latents * timestep
            points = [*points, (step, negative + 4.0 * (positive - negative))][-order - 1 :]
        latents = latents - 0.1 * timestep * extrapolate(points, step)
    torch.testing.assert_close(run_alone(request)[-1], latents)


def test_only_the_negative_branch_stands_still():
    request, counts = cached(toy_request(steps=4), negative_only=True), []
    pipeline = ToyPipeline()
    pipeline.transformer.fail = lambda sequences: counts.append(sorted(sequence.branch for sequence in sequences))
    run_alone(request, make_runner(pipeline))
    assert counts == [[0, 1], [0], [0, 1], [0]]


CACHES = [{}, {"order": 2}, {"negative_only": True, "interval": 3, "order": 1}, {"range": (0.3, 0.9)}]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("make_pace", [lambda: None, DevicePace])
def test_the_same_bits_alone_in_company_and_on_two_ranks(cache, make_pace):
    request = cached(toy_request("a cat", steps=9), **cache)
    others = [toy_request("a dog", steps=9, seed=1), cached(toy_request("a cow", steps=9, seed=2), interval=4)]
    expected = run_alone(request)
    together, ranks = [request, *others], Ranks(make_pace)
    for step in range(9):
        owners = [tuple(range(spec.branches_at(step))) for spec in together]
        assign = [Assign(id, of_branches) for id, of_branches in enumerate(owners)]
        ranks.start(plan(step, assign=assign) if step else join(together, owners))
        for runner in ranks.runners:
            assert torch.equal(runner.states[0].latents, expected[step])
    assert ranks.failures() == []


def test_a_direct_call_takes_the_same_steps():
    request = cached(toy_request(steps=9, interval=(0.2, 0.8)), order=1)
    assert torch.equal(generate(ToyPipeline(), request), run_alone(request)[-1])


def test_a_cache_that_cannot_be_filled_fails_its_request_alone():
    spared = toy_request("spared", steps=9)
    runner = make_runner(ToyPipeline())
    runner.run(join([cached(spared), toy_request("a dog", steps=9, seed=1)]))
    runner.states[0].history.clear()
    report = runner.run(plan(1, assign=[Assign(0, ())]))
    assert [id for id, _ in report.failed] == [0]
    assert runner.states[1].index == 2


# ---- in plans ----


def test_who_has_a_spared_step_is_told_to_take_it():
    """A spared step is one that is taken, and a plan says so."""
    batch, played = StepBatch(2, 8, 10**6, UNCALIBRATED), PlayedRanks(2)
    batch.add("one", 0, cached(toy_request(steps=6), range=(0.0, 0.7)))
    assigned = []
    while len(batch.stepping.running) + len(batch.stepping.preparing) + len(batch.waiting):
        step = played.steps[0]
        assigned += [(step, assign.owners) for assign in run_plan(batch, played)[0].plan.assign]
    assert assigned == [(0, (0, 1)), (1, ()), (2, (0, 1)), (3, ()), (4, (0, 1))]
    assert [sum(tokens) for tokens in played.worked] == [13, 0, 13, 0, 13, 13]


def test_the_time_of_a_spared_step_goes_to_others():
    """Where one rank has a cached request and the other two plain ones, these share both ranks in spared steps."""
    batch, played = StepBatch(2, 8, 10**6, UNCALIBRATED), PlayedRanks(2)
    spared = cached(toy_request("spared", None, steps=60, image_tokens=2000))
    plain = [toy_request(prompt, None, steps=60, image_tokens=1000) for prompt in ("a", "b")]
    play(batch, played, [(0, spec) for spec in (spared, *plain)])
    lopsided = [step for step, tokens in enumerate(played.worked) if max(tokens) > 1.1 * min(tokens)]
    assert len(lopsided) <= 4, "but for the steps until a text is encoded there"
    assert [sum(tokens) for tokens in played.worked[40:44]] == [4008, 2002, 4008, 2002]


def test_a_long_requests_spared_steps_need_no_rank():
    batch, played = StepBatch(2, 8, 100, UNCALIBRATED), PlayedRanks(2, long_delay=3)
    request = batch.add("long", 0, cached(toy_request(steps=5, image_tokens=500)))
    assert request.is_long
    forwards = []
    for _ in range(60):
        planned, decoded = run_plan(batch, played)
        forwards += [forward.owners for forward in planned.plan.forwards]
        for done in decoded:
            batch.finish(done)
    assert forwards == [(0, 1), (), (0, 1), (), (0, 1)]
    assert len(batch) == 0


def test_a_stream_sits_out_no_step_that_would_spare_nobody_time():
    cost = msgspec.structs.replace(UNCALIBRATED, decode_us=2000)  # of a preview: as long as some steps
    batch, played = StepBatch(1, 8, 10**6, cost), PlayedRanks(1)
    request = msgspec.structs.replace(cached(toy_request(steps=20, image_tokens=400)), previews=3)
    streaming = batch.add("stream", 0, request)
    batch.add("plain", 0, toy_request(steps=60, image_tokens=400))
    rested = []
    while streaming.done_steps < 20:
        planned, _ = run_plan(batch, played)
        if streaming.id in batch.stepping.running and planned.running and streaming not in planned.running:
            rested.append(streaming.forwarded[played.steps[streaming.id]])
    assert rested
    assert 0 not in rested


def test_what_is_spared_is_not_predicted():
    plain = toy_request(steps=8, image_tokens=1000)
    spared = cached(plain)
    costs = [ScheduledRequest("", 0, 0, spec, UNCALIBRATED, 0.0).work for spec in (plain, spared)]
    seconds = [predicted_seconds(spec, 1, UNCALIBRATED, 2) for spec in (plain, spared)]
    forward = UNCALIBRATED.forward(1000 + len("a cat"))
    assert costs[0] - costs[1] == 4 * (forward + UNCALIBRATED.forward(1000))
    assert 1e6 * (seconds[0] - seconds[1]) == pytest.approx(4 * forward)


def test_a_result_says_how_often_its_branches_were_computed():
    batch, played, metrics = StepBatch(2, 8, 10**6, UNCALIBRATED), PlayedRanks(2), {}
    batch.add("cached", 0, cached(toy_request(steps=8, interval=(0.0, 0.5))))
    batch.add("plain", 0, toy_request(steps=8))
    while len(batch):
        for request in run_plan(batch, played)[1]:
            packed = pack_result(ResultHeader(metrics=request.metrics(0.0), error="no pixels"))
            metrics[request.request_id] = unpack_result(packed)[0].metrics
            batch.finish(request)
    assert (metrics["cached"].computed_steps, metrics["cached"].reused_steps) == ([4, 2], [4, 2])
    assert (metrics["plain"].computed_steps, metrics["plain"].reused_steps) == ([8, 8], [0, 0])


# ---- what a user asks ----

GUIDED = {"negative_prompt": "bad", "true_cfg_scale": 4.0}


def test_fields_become_a_cache():
    assert resolve()[0].cache is None
    assert resolve(cache="off")[0].cache is None
    assert resolve(cache="static")[0].cache == StepCache()
    asked = {"cache_interval": 3, "cache_range": [0.25, 1], "cache_order": 1, "cache_branches": "negative"}
    (request,) = resolve(cache="static", **asked, **GUIDED)
    assert request.cache == StepCache(interval=3, range=(0.25, 1.0), order=1, negative_only=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cache", "adaptive"),
        ("cache", True),
        ("cache_interval", 1),
        ("cache_interval", 2.0),
        ("cache_interval", True),
        ("cache_order", 3),
        ("cache_order", -1),
        ("cache_range", (0.5, 0.5)),
        ("cache_range", 0.5),
        ("cache_branches", "positive"),
    ],
)
def test_what_no_cache_can_have_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequestError) as refused:
        resolve(**{"cache": "static", field: value})
    assert refused.value.param == field


@pytest.mark.parametrize("mode", [{}, {"cache": "off"}])
@pytest.mark.parametrize(
    "asked", [{"cache_interval": 2}, {"cache_range": (0, 1)}, {"cache_order": 0}, {"cache_branches": "all"}]
)
def test_numbers_without_a_cache_are_refused(mode, asked):
    with pytest.raises(InvalidRequestError, match='cache is not "static"') as refused:
        resolve(**mode, **asked)
    assert refused.value.param == next(iter(asked))


def test_a_negative_branch_that_is_not_there_is_refused():
    with pytest.raises(InvalidRequestError, match="no negative branch"):
        resolve(cache="static", cache_branches="negative")


def test_a_model_may_have_a_cache_by_default():
    """A model's default cache is any request's to change or to switch off."""
    default = DiffusionParams(
        height=64, width=64, num_inference_steps=4, cache="static", cache_interval=3, cache_branches="negative"
    )
    info = type(INFO)(**{**vars(INFO), "default_params": default})
    assert resolve(info=info)[0].cache == StepCache(interval=3, negative_only=True)
    assert resolve(info=info, cache_interval=2)[0].cache.interval == 2
    assert resolve(info=info, cache="off")[0].cache is None


@pytest.mark.parametrize("cache", [{"interval": 1}, {"order": 3}, {"range": (0.0, 1.5)}, {"range": (float("nan"), 1)}])
def test_what_cannot_be_planned_is_refused_by_the_engine_too(cache):
    with pytest.raises(ValueError, match=f"cache_{next(iter(cache))}"):
        StepBatch(1, 1, 100, UNCALIBRATED).add("bad", 0, cached(toy_request(), **cache))
