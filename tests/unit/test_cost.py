"""The cost model: what it predicts, what it is fitted to, and where a pack stops being worth its growth."""

import random

import pytest

from vllm_cfg_plugin.engine.calibration import Calibration, slowest
from vllm_cfg_plugin.engine.cost import (
    UNCALIBRATED,
    CostModel,
    PackSample,
    find_token_budget,
    fit_forward,
    fit_line,
)

STEP, TOKEN, SQUARE = 3000.0, 20.0, 0.05


def pack(*lengths, factor=1.0):
    us = STEP + sum(TOKEN * n + SQUARE * n * n for n in lengths)
    return PackSample(lengths, us * factor)


def packs(*times, first=16):
    """Packs of `first`, 2 * `first`, ... tokens that take the given microseconds."""
    return [PackSample((first,) * 2**i, us) for i, us in enumerate(times)]


def on_a_line(step, token, count, noise=0.0, seed=0):
    draw = random.Random(seed)
    return packs(*((step + token * 16 * 2**i) * (1 + draw.uniform(0, noise)) for i in range(count)))


def test_uncalibrated_every_token_costs_one():
    assert [UNCALIBRATED.forward(n) for n in (1, 20, 4096)] == [1, 20, 4096]
    assert (UNCALIBRATED.encode(7), UNCALIBRATED.decode(16), UNCALIBRATED.step_us) == (7, 16, 0)


def test_predictions_are_whole_microseconds_from_one_up():
    cost = CostModel(
        step_us=5, token_us=0.5, square_us=0.25, encode_us=10, encode_token_us=1.4, decode_us=0, decode_token_us=0.01
    )
    assert [cost.forward(n) for n in (0, 1, 10)] == [1, 1, 30]
    assert cost.encode(4) == 16
    assert cost.decode(16) == 1


def test_the_fit_recovers_what_made_the_measurements():
    samples = [pack(9), pack(21), *(pack(*[21] * n) for n in (2, 4, 8, 16)), pack(84), pack(336)]
    assert fit_forward(samples) == pytest.approx((STEP, TOKEN, SQUARE))


def test_a_noisy_fit_predicts_packs_it_has_not_seen():
    """The fit of noisy measurements predicts packs it has not seen."""
    noise = random.Random(1)
    lengths = [(9,), (21,), *((21,) * n for n in (2, 4, 8, 16, 32)), (84,), (336,)]
    step, token, square = fit_forward([pack(*some, factor=noise.uniform(0.97, 1.03)) for some in lengths])
    for mixed in ((21, 21, 21, 84, 336), (500,), (84,) * 6):
        predicted = step + sum(token * n + square * n * n for n in mixed)
        assert predicted == pytest.approx(pack(*mixed).us, rel=0.06)


def test_no_coefficient_is_negative():
    per_sequence = [PackSample((n,), us) for n, us in ((10, 100.0), (20, 150.0), (40, 180.0), (80, 190.0))]
    assert min(fit_forward(per_sequence)) >= 0
    assert fit_line([(10, 50.0), (20, 40.0)]) == pytest.approx((1800 / 41, 0.0))


def test_few_measurements_are_proportional_then_linear():
    """Too few measurements are taken for proportional then for linear."""
    assert fit_forward([PackSample((4096,), 8192.0)]) == pytest.approx((0, 2, 0))
    assert fit_forward([PackSample((10,), 40.0), PackSample((30,), 80.0)]) == pytest.approx((20, 2, 0))
    assert fit_line([(16, 32.0)]) == pytest.approx((0, 2))


def test_the_budget_is_where_time_per_token_stops_falling():
    step, token = 1000.0, 10.0
    budget = find_token_budget(on_a_line(step, token, 8))

    def gain(tokens):
        return 1 - (step / (2 * tokens) + token) / (step / tokens + token)

    assert gain(budget) == pytest.approx(0.025)


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_the_budget_little(seed):
    quiet = find_token_budget(on_a_line(1000, 10, 7))
    assert find_token_budget(on_a_line(1000, 10, 7, noise=0.1, seed=seed)) == pytest.approx(quiet, rel=0.25)


def test_an_accelerator_not_full_takes_no_longer_for_more():
    """An accelerator that is not full yet takes the same time for more."""
    samples = packs(100, 100, 100, 101, 200, 399)
    assert find_token_budget(samples) == 16 * 2**3
    assert find_token_budget(samples[::-1]) == 16 * 2**3


def test_one_disturbed_measurement_does_not_end_the_search():
    assert find_token_budget(packs(100, 100, 199, 101, 200, 399)) == 16 * 2**3


def test_time_per_token_that_rises_again_ends_the_search():
    assert find_token_budget(packs(100, 100, 100, 300, 900)) == 16 * 2**2


def test_a_largest_pack_that_gains_may_double_once_more():
    """Where the largest pack still gains it may double once more."""
    assert find_token_budget(on_a_line(1000, 0, 3)) == 16 * 2**3
    assert find_token_budget(on_a_line(1000, 1, 3)) == 16 * 2**3
    assert find_token_budget(packs(100, 60, 70)) == 16 * 2**3


def test_a_model_that_gains_nothing_packs_one_sequence():
    """A model that gains nothing from packing takes one sequence a step."""
    assert find_token_budget(packs(160)) == 16
    assert find_token_budget(packs(160, 319)) == 16


def test_the_slowest_rank_counts_for_everything():
    fields = dict.fromkeys(CostModel.__struct_fields__, 1.0)
    first = Calibration(cost=CostModel(**fields | {"step_us": 5.0}), token_budget=100, default_tokens=16)
    second = Calibration(cost=CostModel(**fields | {"token_us": 7.0}), token_budget=80, default_tokens=20)
    both = slowest([first, second])
    assert both == Calibration(
        cost=CostModel(**fields | {"step_us": 5.0, "token_us": 7.0}), token_budget=80, default_tokens=20
    )
    assert slowest([first]) == first
