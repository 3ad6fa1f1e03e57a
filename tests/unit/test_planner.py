"""The planner: every branch has one rank that may own it, no rank idles while another has two things to do."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_cfg_plugin.engine.planner import Item, Move, choose_side_rank, level, moves_that_pay, rank_loads

repeatable = settings(derandomize=True, deadline=None, max_examples=200)


def on(owner, cost=100, allowed=(0, 1)):
    return Item(cost, owner, frozenset(allowed))


def makespan(items, owners, ranks, base=None):
    return max(rank_loads([item.cost for item in items], owners, ranks, base))


def settled(items, owners):
    return [replace(item, owner=owner) for item, owner in zip(items, owners, strict=True)]


def best_makespan(items, ranks, base):
    """Of all assignments, tried one by one; those with equal loads so far are one."""
    reached = {tuple(base or [0] * ranks)}
    for item in items:
        reached = {
            (*loads[:rank], loads[rank] + item.cost, *loads[rank + 1 :]) for loads in reached for rank in item.allowed
        }
    return min(max(loads) for loads in reached)


@st.composite
def problems(draw, most_items=40, most_ranks=8):
    """Items, ranks and base loads; costs of one size, of few sizes and of any size."""
    ranks = draw(st.integers(1, most_ranks))
    rank = st.integers(0, ranks - 1)
    cost = draw(st.sampled_from([st.just(700), st.integers(0, 9), st.sampled_from([5, 14, 60]), st.integers(1, 10**5)]))
    everywhere = frozenset(range(ranks))
    allowed = draw(st.sampled_from([st.just(everywhere), st.frozensets(rank, min_size=1)]))
    items = draw(st.lists(st.builds(Item, cost=cost, owner=rank, allowed=allowed), max_size=most_items))
    base = draw(st.none() | st.lists(st.integers(0, 10**5) | st.just(0), min_size=ranks, max_size=ranks))
    return items, ranks, base


@repeatable
@given(problems())
def test_every_item_has_one_owner_that_may_own_it(problem):
    items, ranks, base = problem
    owners = level(items, ranks, base)
    assert len(owners) == len(items)
    assert all(owner in item.allowed for owner, item in zip(owners, items, strict=True))


@repeatable
@given(problems())
def test_the_makespan_never_rises(problem):
    items, ranks, base = problem
    items = [item if item.owner in item.allowed else replace(item, owner=min(item.allowed)) for item in items]
    present = [item.owner for item in items]
    owners = level(items, ranks, base)
    assert makespan(items, owners, ranks, base) < makespan(items, present, ranks, base) or owners == present


@repeatable
@given(problems())
def test_levelling_again_changes_nothing(problem):
    items, ranks, base = problem
    owners = level(items, ranks, base)
    assert level(settled(items, owners), ranks, base) == owners


@repeatable
@given(problems())
def test_the_same_input_gives_the_same_plan(problem):
    items, ranks, base = problem
    # An equal set that was filled in another order may iterate in another order.
    copies = [replace(item, allowed=frozenset(sorted(item.allowed, reverse=True))) for item in items]
    assert level(items, ranks, base) == level(copies, ranks, base)


@repeatable
@given(problems(most_items=7, most_ranks=4))
def test_free_items_are_within_grahams_bound_of_the_best(problem):
    """Items that may go anywhere are within Graham's bound of the best."""
    items, ranks, _ = problem
    items = [replace(item, allowed=frozenset(range(ranks))) for item in items]
    assert 3 * makespan(items, level(items, ranks), ranks) <= 4 * best_makespan(items, ranks, None)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_costs_of_three_sizes_are_within_5_percent_of_the_best(ranks):
    for costs in itertools.combinations_with_replacement([7, 10, 23], 7):
        items = [on(0, cost, range(ranks)) for cost in costs]
        assert 20 * makespan(items, level(items, ranks), ranks) <= 21 * best_makespan(items, ranks, None)


@repeatable
@given(problems(most_items=12, most_ranks=4), st.data())
def test_moves_pay_what_they_say(problem, data):
    items, ranks, base = problem
    each = st.lists(st.integers(0, 3000), min_size=len(items), max_size=len(items))
    encode_cost, steps_left = data.draw(each), data.draw(each)
    owners = level(items, ranks, base)
    moves = moves_that_pay(items, owners, ranks, base, encode_cost, steps_left)
    assert moves == moves_that_pay(items, owners, ranks, base, encode_cost, steps_left)
    if not moves:
        return
    assert len({move.rank for move in moves}) == len(moves) == len({move.index for move in moves})
    loads = rank_loads([item.cost for item in items], owners, ranks, base)
    extended = settled(items, owners)
    for move in moves:
        item = extended[move.index]
        assert move.rank not in item.allowed
        assert all(loads[rank] + item.cost >= max(loads) for rank in item.allowed - {owners[move.index]})
        extended[move.index] = replace(item, allowed=item.allowed | {move.rank})
    gain = max(loads) - makespan(items, level(extended, ranks, base), ranks, base)
    fewest_steps = min(steps_left[move.index] for move in moves)
    assert gain * fewest_steps > sum(encode_cost[move.index] for move in moves)


def test_nothing_to_do():
    assert level([], 2) == []
    assert moves_that_pay([], [], 2, [5, 0], [], []) == []


def test_one_rank_owns_everything():
    assert level([on(0, allowed=[0])] * 3, 1) == [0, 0, 0]


def test_a_guided_request_alone_has_positive_on_rank_0():
    """One guided request keeps positive on rank 0 and negative on rank 1."""
    assert level([on(0, 102), on(1, 98)], 2) == [0, 1]
    assert level([on(0, 102, range(4)), on(1, 98, range(4))], 4) == [0, 1]


def test_guided_requests_stay_until_imbalance_exceeds_5_percent():
    """Guided requests stay where they are until the imbalance exceeds 5 percent."""
    assert level([on(0, 104), on(1, 96)] * 4, 2) == [0, 1] * 4
    assert level([on(0, 130), on(1, 70)] * 4, 2) != [0, 1] * 4


def test_a_rank_that_takes_nothing_makes_nobody_move():
    """A rank that nothing can go to does not make the others move."""
    assert level([on(0, 104), on(1, 96)] * 4, 3) == [0, 1] * 4


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_requests_without_guidance_spread_over_all_ranks(ranks):
    owners = level([on(0, 64, range(ranks))] * (4 * ranks), ranks)
    assert rank_loads([64] * len(owners), owners, ranks) == [256] * ranks


def test_four_ranks_share_many_guided_requests():
    items = [on(branch, 100, range(4)) for _ in range(6) for branch in (0, 1)]
    assert rank_loads([100] * 12, level(items, 4), 4) == [300] * 4


def test_three_branches_on_two_ranks():
    items = [on(branch % 2, cost) for branch, cost in enumerate((70, 60, 80))]
    assert level(items, 2) == [1, 1, 0]  # 150 and 60 became 80 and 130, the best there is, by one change


def test_what_longest_first_does_not_solve():
    items = [on(0, cost) for cost in (3, 3, 2, 2, 2)]
    assert makespan(items, level(items, 2), 2) == 6


def test_other_work_of_a_rank_counts():
    assert level([on(0), on(0)], 2, [150, 0]) == [1, 1]
    assert level([on(0), on(1)], 2, [0, 1000]) == [0, 0]


def test_few_items_move():
    items = [on(0) for _ in range(12)] + [on(1) for _ in range(8)]
    owners = level(items, 2)
    assert sum(owner != item.owner for owner, item in zip(owners, items, strict=True)) == 2


def test_an_item_whose_rank_may_not_own_it_moves():
    assert level([on(0, allowed=[1]), on(0, allowed=[0, 1])], 2) == [1, 0]


def test_an_item_that_no_rank_may_own_is_an_error():
    with pytest.raises(ValueError, match="allowed of item 1 is empty"):
        level([on(0), on(0, allowed=[])], 2)


def test_an_item_moves_where_it_pays_to_encode_it_again():
    items = [on(0, allowed=[0]), on(0, allowed=[0])]
    assert moves_that_pay(items, [0, 0], 2, None, [900, 300], [5, 5]) == [Move(1, 1)]
    assert moves_that_pay(items, [0, 0], 2, None, [900, 300], [5, 3]) == []


def test_one_encode_for_each_idle_rank_if_only_both_together_pay():
    items = [on(rank, allowed=[rank]) for rank in (0, 0, 1, 1)]
    assert moves_that_pay(items, [0, 0, 1, 1], 4, None, [300] * 4, [9] * 4) == [Move(0, 2), Move(2, 3)]


def test_an_encode_that_lowers_no_heaviest_rank_pays_not():
    """An encode that cannot lower the heaviest rank alone does not pay."""
    items = [on(rank, allowed=[rank]) for rank in (0, 0, 1, 1)]
    assert moves_that_pay(items, [0, 0, 1, 1], 3, None, [300] * 4, [9] * 4) == []


def test_nothing_is_encoded_for_a_gain_too_small_to_move_for():
    # 1000 on rank 0, 930 on the others: 35 on rank 1 would make both 965, which is within 5 % of 1000.
    items = [on(rank, 30, [rank]) for rank in range(8) for _ in range(31)] + [on(0, 35, [0])] * 2
    owners = [item.owner for item in items]
    assert moves_that_pay(items, owners, 8, None, [0] * len(items), [1000] * len(items)) == []


def test_nothing_that_a_rank_holds_is_encoded_again():
    """Nothing is encoded again that another rank holds already."""
    items = [on(0), on(0), on(0)]
    assert moves_that_pay(items, [0, 0, 0], 3, None, [0] * 3, [9] * 3) == []


def test_side_work_goes_to_the_rank_that_is_done_first():
    assert choose_side_rank([0, 0], [10, 5]) == 1
    assert choose_side_rank([0, 6], [10, 5]) == 0
    assert choose_side_rank([5, 5, 0], [0, 0, 5]) == 0
