"""The groups: which ranks share a request's branches (cfg), and which of them a branch's forward (sequence, tensor).

Ranks are laid out as cfg x sequence x tensor parallel with the last one innermost, like vLLM's own groups. With 8
ranks and 2 of each: those that share a forward [[0, 1, 2, 3], [4, 5, 6, 7]], among them by rows (sequence) [[0, 2],
[1, 3], ...] and by weights (tensor) [[0, 1], [2, 3], ...]; cfg groups [[0, 4], [1, 5], [2, 6], [3, 7]]. vLLM and
torch.distributed are imported only when the groups are built.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from vllm_cfg_plugin.distributed.sequence_group import ALONE, SequenceGroup, use_group
from vllm_cfg_plugin.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator

    from vllm_cfg_plugin.distributed.sequence_exchange import Coordinators

__all__ = [
    "cfg_group_ranks",
    "destroy_model_parallel",
    "get_cfg_group",
    "get_classifier_free_guidance_rank",
    "get_classifier_free_guidance_world_size",
    "get_forward_coordinator",
    "initialize_model_parallel",
    "make_sequence_group",
    "sequence_group_ranks",
    "tensor_group_ranks",
]

_NAMES = ("cfg_parallel_size", "tensor_parallel_size", "sequence_parallel_size")


@dataclass(frozen=True)
class _ParallelState:
    """What `initialize_model_parallel` built.

    Attributes:
        group: vLLM's coordinator of this rank's cfg group.
        forward: those of the ranks that share this one's forwards, empty where it is alone: `make_sequence_group` adds
            to them.
        sizes: of `_NAMES`, that it was built with.
        owns_environment: the torch.distributed world was started here, so it ends here too.
    """

    group: GroupCoordinator
    forward: list[Coordinators]
    sizes: tuple[int, int, int]
    owns_environment: bool


_state: _ParallelState | None = None


def cfg_group_ranks(
    world_size: int, cfg_parallel_size: int, tensor_parallel_size: int, sequence_parallel_size: int = 1
) -> list[list[int]]:
    """The global ranks of every cfg group.

    Raises:
        ConfigurationError: a size below 1, or a world size other than the product of all.
    """
    sizes = dict(zip(_NAMES, (cfg_parallel_size, tensor_parallel_size, sequence_parallel_size), strict=True))
    for name, size in sizes.items():
        if size < 1:
            raise ConfigurationError(f"{name}={size} is not valid: it must be an integer from 1 up")
    needed = cfg_parallel_size * tensor_parallel_size * sequence_parallel_size
    if needed != world_size:
        product = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or name != _NAMES[2])
        raise ConfigurationError(
            f"{product} = {needed} ranks, but the world has {world_size}: start as many as the product, e.g. "
            f"`torchrun --nproc-per-node {needed}`"
        )
    stride = tensor_parallel_size * sequence_parallel_size
    return [list(range(first, world_size, stride)) for first in range(stride)]


def sequence_group_ranks(world_size: int, tensor_parallel_size: int, sequence_parallel_size: int) -> list[list[int]]:
    """The global ranks of every sequence group, of a world size that fits."""
    block = tensor_parallel_size * sequence_parallel_size
    return [
        list(range(start + place, start + block, tensor_parallel_size))
        for start in range(0, world_size, block)
        for place in range(tensor_parallel_size)
    ]


def tensor_group_ranks(world_size: int, tensor_parallel_size: int) -> list[list[int]]:
    """The global ranks of every tensor group, of a world size that fits."""
    return [[*range(first, first + tensor_parallel_size)] for first in range(0, world_size, tensor_parallel_size)]


def initialize_model_parallel(
    cfg_parallel_size: int = 1,
    tensor_parallel_size: int = 1,
    backend: str | None = None,
    sequence_parallel_size: int = 1,
) -> None:
    """Build the groups; every rank of the world must call this.

    Inside a vLLM worker the group is carved out of vLLM's world. Elsewhere, under `torchrun` or in a single plain
    process, vLLM's distributed environment is started from the environment variables first. A second call with the
    same sizes does nothing.

    Args:
        cfg_parallel_size: ranks that share one request's branches.
        tensor_parallel_size: ranks that share one branch's forward by the model's weights: each loads a part of them.
        sequence_parallel_size: ranks that share one branch's forward by its rows. Both together must divide the model's
            heads.
        backend: torch.distributed backend; by default the world's own, or for a new world nccl with CUDA and else gloo.

    Raises:
        ConfigurationError: sizes that don't fit the world, or another call came first with other sizes.
    """
    global _state
    sizes = (cfg_parallel_size, tensor_parallel_size, sequence_parallel_size)
    if _state is not None:
        if _state.sizes != sizes:
            raise ConfigurationError(
                f"({', '.join(_NAMES)})={sizes}, but the groups exist with {_state.sizes}: "
                "call destroy_model_parallel() first"
            )
        return
    import torch.distributed as dist
    from vllm.distributed import parallel_state as vllm_state

    owns_environment = not dist.is_initialized()
    # Read before a world is started: the processes of a wrong launch must fail, not wait for each other.
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if owns_environment else dist.get_world_size()
    groups = cfg_group_ranks(world_size, *sizes)
    _start_vllm_world(backend)
    world = vllm_state.get_world_group()
    group = vllm_state.init_model_parallel_group(
        groups, world.local_rank, backend or dist.get_backend(world.device_group), group_name="cfg"
    )
    _state = _ParallelState(group, [], sizes, owns_environment)
    use_group(make_sequence_group())


def make_sequence_group() -> SequenceGroup:
    """A way to those that share this rank's forwards, for the use of one thread; all of them must call this alike."""
    if _state is None or _state.sizes[1] * _state.sizes[2] == 1:
        return ALONE
    import torch.distributed as dist
    from vllm.distributed import parallel_state as vllm_state

    from vllm_cfg_plugin.distributed.sequence_exchange import Coordinators, connect_sequence_group

    _, tensor, sequence = _state.sizes
    backend, local_rank = dist.get_backend(_state.group.device_group), vllm_state.get_world_group().local_rank
    world_size = dist.get_world_size()

    def connect(groups: list[list[int]], name: str) -> GroupCoordinator:
        return vllm_state.init_model_parallel_group(groups, local_rank, backend, group_name=name)

    everybody = connect(tensor_group_ranks(world_size, tensor * sequence), "forward")
    if tensor == 1:
        coordinators = Coordinators(everybody, sequence=everybody)
    elif sequence == 1:
        coordinators = Coordinators(everybody, tensor=everybody)
    else:
        by_rows = connect(sequence_group_ranks(world_size, tensor, sequence), "sequence")
        coordinators = Coordinators(everybody, by_rows, connect(tensor_group_ranks(world_size, tensor), "tensor"))
    _state.forward.append(coordinators)
    return connect_sequence_group(coordinators)


def destroy_model_parallel() -> None:
    """Undo `initialize_model_parallel`; nothing happens where there is nothing to undo."""
    global _state
    if _state is None:
        return
    from vllm.distributed import parallel_state as vllm_state

    use_group(ALONE)
    for coordinator in dict.fromkeys((_state.group, *chain.from_iterable(_state.forward))):
        if coordinator is not None:
            coordinator.destroy()
    if _state.owns_environment:
        vllm_state.destroy_distributed_environment()
    _state = None


def get_cfg_group() -> GroupCoordinator:
    """vLLM's coordinator of this rank's cfg group.

    Raises:
        ConfigurationError: `initialize_model_parallel` was not called.
    """
    if _state is None:
        raise ConfigurationError(
            "there is no cfg group yet: call initialize_model_parallel(cfg_parallel_size=...) first"
        )
    return _state.group


def get_classifier_free_guidance_world_size() -> int:
    """Ranks that share a request's branches; 1, i.e. sequential, before `initialize_model_parallel`."""
    return 1 if _state is None else _state.group.world_size


def get_classifier_free_guidance_rank() -> int:
    """This rank's place in its cfg group; 0 before `initialize_model_parallel`."""
    return 0 if _state is None else _state.group.rank_in_group


def get_forward_coordinator() -> GroupCoordinator | None:
    """vLLM's coordinator of all ranks that share this one's forwards; None where it is alone."""
    return _state.forward[0].all if _state is not None and _state.forward else None


def _start_vllm_world(backend: str | None) -> None:
    """Start torch.distributed where it is not running, and vLLM's world group where vLLM has none."""
    import torch
    import torch.distributed as dist
    from vllm.distributed import parallel_state as vllm_state

    if vllm_state._WORLD is not None:
        return
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if not dist.is_initialized() and "RANK" not in os.environ:
        # A single plain process meets nobody: it needs neither an address nor a port.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    vllm_state.init_distributed_environment(
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        backend=backend,
    )
