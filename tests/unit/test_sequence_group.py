"""A sequence group as a forward sees it, and torch's collectives in it, with the other ranks played."""

from types import SimpleNamespace

import pytest
import torch

from vllm_cfg_plugin.distributed import sequence_exchange
from vllm_cfg_plugin.distributed.cfg_parallel import predict_on_ranks
from vllm_cfg_plugin.distributed.sequence_exchange import CollectiveGroup, Coordinators
from vllm_cfg_plugin.distributed.sequence_group import (
    ALONE,
    GroupBrokenError,
    MemberFailedError,
    current_group,
    together,
)


class Told:
    """A group that counts what its rank tells the others."""

    rank, size, is_stoppable, trades = 0, 2, True, 0

    def __init__(self):
        self.told = self.agreements = self.failures = 0

    def any(self, flags):
        self.agreements += 1
        return [*flags]

    def fail(self):
        self.told += 1


def test_the_group_shares_what_is_done_together_and_nothing_else():
    group = Told()
    with together(group):
        assert current_group() is group
    assert current_group() is ALONE
    assert (group.agreements, group.told, group.failures) == (1, 0, 0)


def test_the_others_are_told_once_of_a_failure():
    group = Told()
    with pytest.raises(ArithmeticError), together(group), together(group):
        raise ArithmeticError
    assert group.told == 1
    assert group.failures > 0
    assert current_group() is ALONE


def test_of_another_ranks_failure_nobody_is_told():
    group = Told()
    with pytest.raises(MemberFailedError, match="process 1 of this cfg rank failed"), together(group):
        raise MemberFailedError(1)
    assert (group.told, group.failures) == (0, 1)


def test_a_forward_that_shares_nothing_is_said_to(caplog):
    with together(Told()):
        assert predict_on_ranks(1, lambda branches: [torch.ones(1)]) == [torch.ones(1)]
    assert "sequence and tensor parallelism are idle" in caplog.text


@pytest.fixture
def play(monkeypatch):
    """The group of a rank that issued no collective, and what the other one says."""

    def make(*others):
        monkeypatch.setattr(sequence_exchange, "_share", lambda group, size, mine: [mine, *others])
        coordinator = SimpleNamespace(rank_in_group=0, world_size=2, cpu_group=None)
        return CollectiveGroup(Coordinators(coordinator, sequence=coordinator))

    return make


def test_flags_of_all_ranks_are_joined(play):
    assert play((False, 0, [True, False, False])).any([False, False, True]) == [True, False, True]


def test_a_failure_at_the_same_collective_is_one_of_the_forward(play):
    with pytest.raises(MemberFailedError, match="process 1 of this"):
        play((True, 0, [])).any([])
    play((True, 0, [])).fail()


@pytest.mark.parametrize("call", [lambda group: group.any([]), lambda group: group.fail()])
def test_a_failure_at_another_collective_breaks_the_group(play, call):
    with pytest.raises(GroupBrokenError, match="failed in the midst of a forward"):
        call(play((True, 3, [])))
