"""The planner: every branch has one owner, no rank idles while another has two things to do."""

import random

import pytest

from vllm_cfg_plugin.engine.planner import BranchLoad, assign_owners, choose_decode_rank, rank_loads, rebalance


def test_one_rank_owns_everything():
    assert assign_owners((80, 70), [0]) == (0, 0)


def test_two_ranks_take_positive_and_negative_whatever_their_loads():
    assert assign_owners((80, 70), [500, 0]) == (0, 1)
    assert assign_owners((80, 70), [0, 500]) == (0, 1)


def test_a_request_without_guidance_goes_to_the_rank_with_fewest_tokens():
    assert assign_owners((80,), [100, 99]) == (1,)
    assert assign_owners((80,), [99, 100]) == (0,)


def test_three_ranks_share_two_branches_by_load_and_never_give_one_rank_both():
    assert assign_owners((80, 70), [10, 0, 5]) == (1, 2)
    assert assign_owners((80, 70), [0, 0, 0]) == (0, 1)


def test_three_branches_on_two_ranks_leave_the_third_to_the_lighter_rank():
    assert assign_owners((80, 70, 60), [0, 0]) == (0, 1, 1)


def test_unguided_requests_spread_evenly():
    running: list[BranchLoad] = []
    for id in range(8):
        owners = assign_owners((64,), rank_loads(running, 2))
        running.append(BranchLoad(id, (64,), owners))
    assert rank_loads(running, 2) == [256, 256]


def test_rebalance_moves_a_leftover_branch_when_the_other_rank_ran_dry():
    left = [BranchLoad(0, (64,), (0,)), BranchLoad(1, (64,), (0,))]
    moved = rebalance(left, 2)
    assert len(moved) == 1
    assert set(moved.values()) == {(1,)}


def test_rebalance_leaves_guided_pairs_alone():
    assert rebalance([BranchLoad(0, (1000, 10), (0, 1))], 2) == {}


def test_rebalance_does_nothing_when_no_move_lowers_the_heaviest_rank():
    assert rebalance([BranchLoad(0, (64,), (0,))], 2) == {}
    assert rebalance([BranchLoad(0, (64,), (0,)), BranchLoad(1, (64,), (1,))], 2) == {}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_rebalance_keeps_every_branch_and_never_raises_the_heaviest_load(ranks):
    rng = random.Random(ranks)
    for _ in range(200):
        requests = []
        for id in range(rng.randrange(8)):
            tokens = tuple(rng.randrange(16, 300) for _ in range(rng.choice((1, 2))))
            owners = tuple(rng.randrange(ranks) for _ in tokens)
            if len(set(owners)) < min(len(owners), ranks):
                owners = assign_owners(tokens, [0] * ranks)
            requests.append(BranchLoad(id, tokens, owners))
        moved = rebalance(requests, ranks)
        after = [BranchLoad(r.id, r.tokens, moved.get(r.id, r.owners)) for r in requests]
        assert all(len(r.owners) == len(r.tokens) and all(0 <= o < ranks for o in r.owners) for r in after)
        assert max(rank_loads(after, ranks)) <= max(rank_loads(requests, ranks))
        assert rebalance(after, ranks) == {}


def test_decodes_go_to_the_lighter_rank_and_take_turns():
    assert choose_decode_rank([10, 5], [0, 0]) == 1
    assert choose_decode_rank([10, 10], [1, 0]) == 1
    assert choose_decode_rank([10, 10], [1, 1]) == 0
