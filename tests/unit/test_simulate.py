"""The simulator: virtual time adds up, every request is served once, and the same seed gives the same figures."""

import math

import pytest

from benchmarks.contestants import (
    RIVALS,
    Arrival,
    Contestant,
    Machine,
    arrivals,
    contestants,
    mixed_requests,
    request,
    serve,
)
from benchmarks.virtual_ranks import LONG_WEIGHT, SIDE_WEIGHT, STEP_WEIGHT, Core, Overheads, SideTask
from vllm_cfg_plugin.engine.cost import CostModel
from vllm_cfg_plugin.engine.plan import DECODED

COST = CostModel(
    step_us=1000, token_us=40, square_us=0.04, encode_us=3000, encode_token_us=30, decode_us=2000, decode_token_us=50
)
PURE = CostModel(
    step_us=0, token_us=40, square_us=0.04, encode_us=3000, encode_token_us=30, decode_us=2000, decode_token_us=50
)
OURS = Contestant("ours", 0)


def machine(ranks, cost=COST, overheads=Overheads()):  # noqa: B008 (frozen)
    return Machine(ranks, cost, overheads, max_requests=8, max_tokens=2000)


def seconds_alone(ranks, spec, cost, overheads):
    (served,) = serve(OURS, machine(ranks, cost, overheads), arrivals([spec], 1.0, 1, 0))
    return served


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("overheads", [Overheads(), Overheads(request_us=80, admit_us=300)])
def test_one_request_on_one_rank_takes_the_sum_of_its_costs(guided, overheads):
    spec = request(64, 8, guided)
    encodes = sum(COST.encode(tokens) for tokens in spec.text_tokens)
    step = COST.step_us + sum(COST.forward(64 + tokens) for tokens in spec.text_tokens) + overheads.request_us
    whole = overheads.admit_us + encodes + 8 * step + COST.decode(64)
    served = seconds_alone(1, spec, COST, overheads)
    assert 1e6 * served.latency == pytest.approx(whole, abs=0.1)
    assert 1e3 * served.metrics.denoise_ms == pytest.approx(8 * step, abs=0.1)
    assert served.metrics.steps == 8


def test_two_ranks_halve_the_steps_of_guided_requests_only():
    """Two ranks halve the steps of a guided request and not of another."""
    spec = request(128, 10, True, text_tokens=6)  # as many as its negative prompt has
    one, two = (seconds_alone(ranks, spec, PURE, Overheads()).metrics.denoise_ms for ranks in (1, 2))
    assert two == pytest.approx(one / 2, rel=1e-6)
    plain = request(128, 10, False)
    one, two = (seconds_alone(ranks, plain, PURE, Overheads()).metrics.denoise_ms for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-6)


def test_the_exchange_and_the_engine_cost_what_they_are_said_to():
    spec = request(64, 10, True)
    free, paid = (seconds_alone(2, spec, COST, overheads) for overheads in (Overheads(), Overheads(exchange_us=500)))
    assert 1e3 * (paid.metrics.denoise_ms - free.metrics.denoise_ms) == pytest.approx(10 * 500, abs=0.1)
    # Shorter than a step, the engine's work between plans is hidden behind it, but for the first plan.
    hidden = seconds_alone(2, spec, COST, Overheads(engine_us=1000)).metrics.denoise_ms
    shown = seconds_alone(2, spec, COST, Overheads(engine_us=50_000)).metrics.denoise_ms
    assert hidden == pytest.approx(free.metrics.denoise_ms, rel=1e-6)
    assert shown > 10 * free.metrics.denoise_ms


@pytest.mark.parametrize("contestant", contestants(4), ids=lambda contestant: contestant.name)
@pytest.mark.parametrize("burst", [1, 20])
def test_all_are_served_once_and_a_seed_gives_the_same_times(contestant, burst):
    """Every request is served once with all its steps and the same seed gives the same times."""
    specs = mixed_requests(60, seed=3, huge_every=25)
    trace = arrivals(specs, 3.0, burst, seed=3)
    served = serve(contestant, machine(4, overheads=Overheads(25, 80, 300, 200)), trace)
    assert sorted(int(one.name) for one in served) == list(range(60))
    for one in served:
        spec = specs[int(one.name)]
        assert one.metrics.steps == spec.num_inference_steps
        assert one.arrived == pytest.approx(trace[int(one.name)].at / 1e6)
        assert one.latency * 1e6 > COST.decode(spec.image_tokens) + one.metrics.denoise_ms * 1e3
    again = serve(contestant, machine(4, overheads=Overheads(25, 80, 300, 200)), trace)
    assert [(one.name, one.finished) for one in again] == [(one.name, one.finished) for one in served]


def test_no_rank_forwards_more_than_there_is_to_forward():
    specs = mixed_requests(40, seed=1)
    (engine,) = OURS.engines(machine(4, PURE))
    for number, arrival in enumerate(arrivals(specs, 5.0, 1, seed=1)):
        engine.run_until(arrival.at)
        engine.submit(arrival.at, str(number), arrival.spec)
    engine.run_until(math.inf)
    work = sum(
        spec.num_inference_steps * PURE.forward(spec.image_tokens + tokens)
        for spec in specs
        for tokens in spec.text_tokens
    )
    assert sum(core.busy_us for core in engine.ranks.cores) == pytest.approx(work)


def rival(name):
    return next(contestant for contestant in RIVALS if contestant.name == name)


def finishes(contestant, ranks, specs):
    """When each request's image is there if all come at once."""
    served = serve(contestant, machine(ranks), [Arrival(0.0, spec) for spec in specs])
    return {int(one.name): one.finished for one in served}


def test_who_may_join_a_batch_under_each_policy():
    """Equal shapes keeps another shape out and whole requests everybody where we let all join."""
    specs = [request(64, 20, False, name="a"), request(128, 4, False, name="b"), request(64, 20, False, name="c")]
    ours, equal = finishes(OURS, 1, specs), finishes(rival("equal shapes"), 1, specs)
    assert ours[1] < ours[0]
    assert equal[1] > equal[0]
    late = [Arrival(0.0, specs[0]), Arrival(50_000.0, specs[2])]
    _, second = serve(rival("whole requests"), machine(1), late)
    assert second.metrics.queue_ms > 20  # it came at 50 ms, and the first one steps until 80
    _, second = serve(OURS, machine(1), late)
    assert second.metrics.queue_ms < 10


def test_in_fixed_pairs_both_ranks_forward_what_has_no_guidance():
    pairs = rival("fixed pairs")
    (engine,) = pairs.engines(machine(2))
    engine.submit(0.0, "a", pairs.adapt(request(64, 20, False)))
    engine.run_until(math.inf)
    assert [core.busy_us for core in engine.ranks.cores] == [20 * (COST.step_us + COST.forward(72))] * 2


def test_side_work_slows_steps_by_its_weight():
    """Side work slows the stepping thread by its weight and has the core while that waits."""
    core = Core(0)
    core.add_side_work(SideTask(1, 0, 10_000.0, "text"))
    core.add_side_work(SideTask(2, DECODED, 10_000.0))
    core.compute(1024.0)
    assert core.now == pytest.approx(STEP_WEIGHT + 2 * SIDE_WEIGHT)
    left = 20_000.0 - 2 * SIDE_WEIGHT
    core.wait(core.now + left)
    core.wait(core.now + 1.0)
    assert [report.branch for _, report in core.reports] == [0, DECODED]
    assert core.texts == {"text"}


def test_a_long_request_costs_a_small_one_its_weight():
    """A long request takes the sum of its costs and costs a small one its weight."""
    spec, small = request(512, 3, True), request(64, 20, True, name="small")
    forwards = [COST.step_us + COST.forward(spec.image_tokens + tokens) for tokens in spec.text_tokens]
    served = seconds_alone(2, spec, COST, Overheads())
    assert 1e3 * served.metrics.denoise_ms == pytest.approx(3 * max(forwards), abs=0.1)
    alone = seconds_alone(2, small, COST, Overheads())
    both = serve(OURS, machine(2), [Arrival(0.0, spec), Arrival(100_000.0, small)])
    (beside,) = [one for one in both if one.spec == small]
    assert beside.metrics.denoise_ms < (1 + LONG_WEIGHT / STEP_WEIGHT) * alone.metrics.denoise_ms + 1e-3
