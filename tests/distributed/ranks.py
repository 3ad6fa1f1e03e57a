"""Start real gloo ranks and collect what they return; a rank that hangs fails the test instead of stopping it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

from vllm_cfg_plugin.pipelines.registry import FAMILIES

TIMEOUT_S = 120
FAMILY_MODULES = sorted({implementation.partition(":")[0] for implementation in FAMILIES.values()})
PRELOADED = ["vllm.distributed.parallel_state", "vllm.config", "tests.families", *FAMILY_MODULES]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` in `world_size` new processes with torchrun's environment; their results by rank.

    The processes are forked from a server that has done the imports, which take several seconds, once.

    Results must be picklable and, being sent through a pipe, numpy or plain rather than torch tensors.

    Raises:
        AssertionError: a rank raised or gave no result in time; shows its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_run_rank, args=(function, args, rank, world_size, port, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    collected: dict[int, Any] = {}
    try:
        while len(collected) < world_size:
            rank, value, error = results.get(timeout=TIMEOUT_S)
            assert error is None, f"rank {rank} raised:\n{error}"
            collected[rank] = value
    except Empty:
        raise AssertionError(f"only ranks {sorted(collected)} of {world_size} finished in {TIMEOUT_S} s") from None
    finally:
        for process in ranks:
            process.join(timeout=10 if len(collected) == world_size else 0)
            process.kill()
    return [collected[rank] for rank in range(world_size)]


def _run_rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int, results: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    from tests.distributed.nccl_rules import nccl_rules

    try:
        with nccl_rules():
            results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
