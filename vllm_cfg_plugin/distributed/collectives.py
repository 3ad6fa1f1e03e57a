"""Collectives that survive a rank's failure: every rank joins, says whether it has a tensor, and only then sends it.

A rank whose forward raised can't know the shape the others are about to send, so a small header goes first, over the
CPU group; if any header reports a failure all ranks raise instead of waiting for a tensor that never comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from vllm_cfg_plugin.errors import RequestFailedError

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator

_MAX_DIMS = 6
_HEADER_SIZE = 3 + _MAX_DIMS  # state, dtype, number of dims, dims
_FAILED, _EMPTY, _READY = 0, 1, 2
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gather_first(
    group: GroupCoordinator, count: int, mine: torch.Tensor | None, error: BaseException | None
) -> list[torch.Tensor]:
    """All-gather one tensor of each of the group's first `count` ranks; all of the same shape and dtype.

    Args:
        mine: this rank's tensor; None on a rank from `count` on, and where `error` is set.
        error: why this rank has no tensor.

    Raises:
        RequestFailedError: some rank failed, or the shapes differ; raised on every rank. The failing rank raises its
            own error.
    """
    header = torch.tensor(_header(mine, error), dtype=torch.int64)
    headers = [torch.empty_like(header) for _ in range(group.world_size)]
    dist.all_gather(headers, header, group=group.cpu_group)
    states = [received.tolist() for received in headers]
    _raise_failures(states, error)
    first = states[0]
    if any(state != first for state in states[:count]):
        shapes = ", ".join(f"rank {rank}: {_shape(state)}" for rank, state in enumerate(states[:count]))
        raise RequestFailedError(
            f"the branches' predictions differ in shape or dtype ({shapes}); they can't be combined"
        )
    if mine is None:
        mine = torch.zeros(_shape(first), dtype=_DTYPES[first[1]], device=group.device)
    return list(group.all_gather(mine.contiguous()[None], dim=0).unbind(0)[:count])


def broadcast_first(
    group: GroupCoordinator, mine: torch.Tensor | None, error: BaseException | None, device: torch.device
) -> torch.Tensor:
    """Broadcast the first rank's tensor to the group; the other ranks pass None.

    Raises:
        RequestFailedError: the first rank failed; raised on every rank. The first rank raises its own error.
    """
    header = torch.tensor(_header(mine, error), dtype=torch.int64)
    dist.broadcast(header, src=group.ranks[0], group=group.cpu_group)
    state = header.tolist()
    _raise_failures([state], error)
    sent = torch.empty(_shape(state), dtype=_DTYPES[state[1]], device=device) if mine is None else mine.contiguous()
    return group.broadcast(sent, src=0)


def _header(tensor: torch.Tensor | None, error: BaseException | None) -> list[int]:
    if error is not None or tensor is None:
        return [_FAILED if error is not None else _EMPTY] + [0] * (_HEADER_SIZE - 1)
    dims = list(tensor.shape) + [0] * (_MAX_DIMS - tensor.dim())
    return [_READY, _DTYPES.index(tensor.dtype), tensor.dim(), *dims]


def _shape(state: list[int]) -> list[int]:
    return state[3 : 3 + state[2]]


def _raise_failures(states: list[list[int]], error: BaseException | None) -> None:
    if error is not None:
        raise error
    failed = [rank for rank, state in enumerate(states) if state[0] == _FAILED]
    if failed:
        raise RequestFailedError(f"cfg rank {failed[0]} failed in this step; its own log has the reason")
