"""How the ranks of a sequence group reach each other: through shared memory on a CPU, else by torch's collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from vllm_cfg_plugin.distributed import shared_memory
from vllm_cfg_plugin.distributed.sequence_group import GroupBrokenError, MemberFailedError, SequenceGroup
from vllm_cfg_plugin.distributed.shared_memory import SharedMemoryGather
from vllm_cfg_plugin.logs import get_logger

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator

logger = get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def connect_sequence_group(coordinator: GroupCoordinator) -> SequenceGroup:
    """A sequence group of these ranks, for the use of one thread; all of them must call this together.

    Args:
        coordinator: vLLM's, whose collectives no other thread uses.
    """
    rank, size = coordinator.rank_in_group, coordinator.world_size
    if coordinator.device.type == "cpu":
        memory = shared_memory.connect(rank, size, partial(_share, coordinator.cpu_group, size))
        if memory is not None:
            return SharedMemoryGroup(rank, size, memory)
        logger.info("The ranks of a sequence group can't share memory; they trade through the process group instead")
    return CollectiveGroup(coordinator)


def _share(group: dist.ProcessGroup, size: int, mine: object) -> list[object]:
    shared: list[object] = [None] * size
    dist.all_gather_object(shared, mine, group=group)
    return shared


def _unstopped(method: Callable[P, T]) -> Callable[P, T]:
    """A long forward that is cancelled stops in any of torch's functions; in the midst of an exchange it must not."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    return call


class SharedMemoryGroup(SequenceGroup):
    """Ranks of one host, on its CPU."""

    is_stoppable = True

    def __init__(self, rank: int, size: int, memory: SharedMemoryGather) -> None:
        self._rank = rank
        self._size = size
        self._memory = memory
        self.trades = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @_unstopped
    def all_to_all(self, parts: torch.Tensor) -> torch.Tensor:
        self.trades += 1
        return self._memory.all_to_all(parts)

    @_unstopped
    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        return self._memory(rows.reshape(-1)).view(-1, *rows.shape[1:])

    @_unstopped
    def any(self, flags: Sequence[bool]) -> list[bool]:
        gathered: list[bool] = self._memory(torch.tensor([*flags, False])).any(dim=0).tolist()
        return gathered[: len(flags)]

    @_unstopped
    def fail(self) -> None:
        self._memory.fail()


class CollectiveGroup(SequenceGroup):
    """Ranks with torch's collectives, NCCL's for one.

    A collective can't be called off: a rank that fails tells the others when they next ask each other, and if they are
    at another one of the collectives by then, the group is broken.
    """

    is_stoppable = False

    def __init__(self, coordinator: GroupCoordinator) -> None:
        self._coordinator = coordinator
        self._issued = 0
        self.trades = 0

    @property
    def rank(self) -> int:
        return self._coordinator.rank_in_group

    @property
    def size(self) -> int:
        return self._coordinator.world_size

    def all_to_all(self, parts: torch.Tensor) -> torch.Tensor:
        self._issued += 1
        self.trades += 1
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self._coordinator.device_group)
        return received

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        self._issued += 1
        return self._coordinator.all_gather(rows.contiguous(), dim=0)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        told = self._tell(False, flags)
        return [any(state[i] for state in told) for i in range(len(flags))]

    def fail(self) -> None:
        self._tell(True)

    def _tell(self, has_failed: bool, flags: Sequence[bool] = ()) -> list[Any]:
        """The flags of every rank.

        Raises:
            MemberFailedError: another rank has failed.
            GroupBrokenError: one has failed, and at another collective than this rank.
        """
        states: list[Any] = [*_share(self._coordinator.cpu_group, self.size, (has_failed, self._issued, [*flags]))]
        failed = [rank for rank, state in enumerate(states) if state[0]]
        if failed and len({issued for _, issued, _ in states}) > 1:
            raise GroupBrokenError(f"rank {failed[0]} of this sequence group failed in the midst of a forward")
        if failed and not has_failed:
            raise MemberFailedError(failed[0])
        return [state[2] for state in states]
