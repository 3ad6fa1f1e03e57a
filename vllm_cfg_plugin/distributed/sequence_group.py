"""The processes that share one packed forward, as a forward sees them.

They share it by its rows, by its weights, or by both. By rows: sequence parallelism after Ulysses
(https://arxiv.org/abs/2309.14509). Every process has a window of each stream's rows. All of a layer but attention works
row by row; around attention they trade rows for heads, so that each has all rows of some heads. No sum changes its
order, so sequence groups of any size give the bits of one process. By weights: tensor parallelism after Megatron-LM
(https://arxiv.org/abs/1909.08053), see `pipelines/common/tensor_parallel.py`. Must import nothing but torch and the
errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import torch

from vllm_cfg_plugin.errors import RequestFailedError


class Peers(Protocol):
    """Ranks that all make the same calls in the same order.

    Attributes:
        rank, size: this process among them.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_to_all(self, parts: torch.Tensor) -> torch.Tensor:
        """[ranks, ...] to each rank -> [ranks, ...] from each rank.

        Raises:
            MemberFailedError: a rank of the group called `fail`.
        """

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, ...] of each rank -> [ranks * rows, ...]; raises as `all_to_all` does."""


class SequenceGroup(Peers, Protocol):
    """All processes that share a forward.

    Attributes:
        sequence: those among them that share its rows with this one, and have the same weights.
        tensor: those that share its weights with this one, and have the same rows.
        is_stoppable: one rank may stop at any time, in what they do together, and tell the others.
        trades: exchanges within `sequence` and `tensor` so far.
        failures: how often what they did together has failed so far.
    """

    sequence: Peers
    tensor: Peers
    is_stoppable: bool
    failures: int

    @property
    def trades(self) -> int: ...

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag whether some rank has set it; raises as `all_to_all` does."""

    def fail(self) -> None:
        """Tell the others, in place of the next call, that this rank can't go on with what they do together."""


class MemberFailedError(RequestFailedError):
    """Another rank of the group failed in what all of them did together; its own log has the reason."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"process {rank} of this cfg rank failed; its own log has the reason")


class GroupBrokenError(BaseException):
    """The ranks of a group are at different calls and can't meet any more: they have to start anew.

    No `Exception`, so that nobody takes it for the failure of a request.
    """


class _Alone:
    """The group of one rank."""

    rank = 0
    size = 1
    is_stoppable = True
    trades = 0
    failures = 0

    def __init__(self) -> None:
        self.sequence: Peers = self
        self.tensor: Peers = self

    def all_to_all(self, parts: torch.Tensor) -> torch.Tensor:
        return parts

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def any(self, flags: Sequence[bool]) -> list[bool]:
        return [*flags]

    def fail(self) -> None:
        """There is nobody to tell."""


ALONE: SequenceGroup = _Alone()


class SequenceGroups(NamedTuple):
    """A rank's ways to those that share its forwards, one for each thread with forwards: the steps, and beside them."""

    steps: SequenceGroup = ALONE
    beside: SequenceGroup = ALONE


NO_GROUPS = SequenceGroups()

_TOLD = "_sequence_group_knows"  # attribute of an exception
_of_process: SequenceGroup = ALONE
_of_context: ContextVar[SequenceGroup | None] = ContextVar("sequence_group", default=None)


def current_group() -> SequenceGroup:
    """The group that shares the forwards of this thread: that of `together`, else the process's own."""
    return _of_context.get() or _of_process


def is_own_group(group: SequenceGroup) -> bool:
    """Whether a group is the process's own, within which one thread forwards, in one order."""
    return group is _of_process


def use_group(group: SequenceGroup) -> None:
    """Share the forwards of this process, wherever there is no `together`."""
    global _of_process
    _of_process = group


@contextmanager
def together(group: SequenceGroup) -> Iterator[None]:
    """What all ranks of the group do alike, and all of them or none: where one fails, the others do at once.

    Raises:
        MemberFailedError: another rank failed.
    """
    token = _of_context.set(group)
    try:
        yield
        group.any([])  # where a rank has failed after the last exchange
    except MemberFailedError:
        group.failures += 1
        raise
    except BaseException as error:
        group.failures += 1
        if not hasattr(error, _TOLD):  # where one is within another, once
            group.fail()
            setattr(error, _TOLD, True)
        raise
    finally:
        _of_context.reset(token)
