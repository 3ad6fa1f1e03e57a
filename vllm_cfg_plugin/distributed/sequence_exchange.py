"""How processes that share a forward reach each other: through shared memory on a CPU, else by torch's collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from vllm_cfg_plugin.distributed import shared_memory
from vllm_cfg_plugin.distributed.sequence_group import ALONE, GroupBrokenError, MemberFailedError, Peers, SequenceGroup
from vllm_cfg_plugin.distributed.shared_memory import SharedMemoryGather
from vllm_cfg_plugin.logs import get_logger

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator

logger = get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Coordinators(NamedTuple):
    """vLLM's coordinators of the ranks that share a forward, whose collectives no other thread uses.

    Attributes:
        all: of all of them.
        sequence, tensor: of those that share its rows, and its weights, with this one; None where that is this one
            alone.
    """

    all: GroupCoordinator
    sequence: GroupCoordinator | None = None
    tensor: GroupCoordinator | None = None


def connect_sequence_group(coordinators: Coordinators) -> SequenceGroup:
    """The group of these ranks, for the use of one thread; all of them must call this together."""
    everybody = coordinators.all
    rank, size = everybody.rank_in_group, everybody.world_size
    if everybody.device.type == "cpu":
        memory = shared_memory.connect(rank, size, partial(_share, everybody.cpu_group, size))
        if memory is not None:
            tensor = coordinators.tensor
            return SharedMemoryGroup(rank, size, memory, 1 if tensor is None else tensor.world_size)
        logger.info("The processes of a cfg rank can't share memory; they trade through the process group instead")
    return CollectiveGroup(coordinators)


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


class _SharedMemoryPeers(Peers):
    """Some ranks of a group that exchange among themselves, while all others do so too.

    Attributes:
        exchanges: how many so far.
    """

    def __init__(self, rank: int, members: Sequence[int], memory: SharedMemoryGather) -> None:
        self._rank = members.index(rank)
        self._members = members
        self._memory = memory
        self.exchanges = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._members)

    @_unstopped
    def all_to_all(self, parts: torch.Tensor) -> torch.Tensor:
        self.exchanges += 1
        return self._memory.all_to_all(parts, self._members)

    @_unstopped
    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        self.exchanges += 1
        return self._memory(rows.reshape(-1), self._members).view(-1, *rows.shape[1:])


class SharedMemoryGroup(_SharedMemoryPeers, SequenceGroup):
    """Ranks of one host, on its CPU.

    Args:
        tensor_size: how many of them, next to each other, share weights.
    """

    is_stoppable = True

    def __init__(self, rank: int, size: int, memory: SharedMemoryGather, tensor_size: int = 1) -> None:
        super().__init__(rank, range(size), memory)
        first, place = rank - rank % tensor_size, rank % tensor_size
        sequence = _SharedMemoryPeers(rank, range(place, size, tensor_size), memory)
        tensor = _SharedMemoryPeers(rank, range(first, first + tensor_size), memory)
        self.sequence, self.tensor, self._parts = sequence, tensor, (sequence, tensor)
        self.failures = 0

    @property
    def trades(self) -> int:
        return sum(peers.exchanges for peers in self._parts)

    @_unstopped
    def any(self, flags: Sequence[bool]) -> list[bool]:
        gathered: list[bool] = self._memory(torch.tensor([*flags, False])).any(dim=0).tolist()
        return gathered[: len(flags)]

    @_unstopped
    def fail(self) -> None:
        self._memory.fail()


class _CollectivePeers(Peers):
    """Ranks with a coordinator of their own.

    Attributes:
        issued: collectives so far.
    """

    def __init__(self, coordinator: GroupCoordinator) -> None:
        self._coordinator = coordinator
        self.issued = 0

    @property
    def rank(self) -> int:
        return self._coordinator.rank_in_group

    @property
    def size(self) -> int:
        return self._coordinator.world_size

    def all_to_all(self, parts: torch.Tensor) -> torch.Tensor:
        self.issued += 1
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self._coordinator.device_group)
        return received

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        self.issued += 1
        return self._coordinator.all_gather(rows.contiguous(), dim=0)


def _peers(coordinator: GroupCoordinator | None) -> Peers:
    return ALONE if coordinator is None else _CollectivePeers(coordinator)


class CollectiveGroup(_CollectivePeers, SequenceGroup):
    """Ranks with torch's collectives, NCCL's for one.

    A collective can't be called off: a rank that fails tells the others when they next ask each other, and if they are
    at another one of the collectives by then, the group is broken.
    """

    is_stoppable = False

    def __init__(self, coordinators: Coordinators) -> None:
        super().__init__(coordinators.all)
        self.sequence = _peers(coordinators.sequence)
        self.tensor = _peers(coordinators.tensor)
        self.failures = 0

    @property
    def trades(self) -> int:
        return sum(peers.issued for peers in (self.sequence, self.tensor) if isinstance(peers, _CollectivePeers))

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
        mine = (has_failed, self.issued + self.trades, [*flags])
        states: list[Any] = [*_share(self._coordinator.cpu_group, self.size, mine)]
        failed = [rank for rank, state in enumerate(states) if state[0]]
        if failed and len({issued for _, issued, _ in states}) > 1:
            raise GroupBrokenError(f"process {failed[0]} of this cfg rank failed in the midst of a forward")
        if failed and not has_failed:
            raise MemberFailedError(failed[0])
        return [state[2] for state in states]
