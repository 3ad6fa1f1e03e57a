"""What the step's one collective costs: gloo's all_gather and shared memory, interleaved, between two pinned ranks.

    python benchmarks/exchange.py --sizes 64 256 512 1024 --rounds 2000

A row is one request's prediction as the engine exchanges it: an image's latents, 8x8 pixels a token of 32 channels up
to 256 px (the bundled model's layout), 16x16 pixels a token of 64 channels from 512 px on (Qwen-Image's). Before each
timed exchange the ranks meet, so both are ready at once; an exchange takes as long as its slower rank.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from vllm_cfg_plugin.distributed.shared_memory import connect

RANKS = 2
Gather = Callable[[torch.Tensor], torch.Tensor]
Times = dict[tuple[int, str], list[float]]  # (side, how) -> seconds of each exchange


def row_elements(side: int) -> int:
    return (side // 8) ** 2 * 32 if side <= 256 else (side // 16) ** 2 * 64


def gloo_gather(row: torch.Tensor) -> torch.Tensor:
    rows = row.new_empty(RANKS, row.numel())
    dist.all_gather(list(rows.unbind(0)), row)
    return rows


def share(mine: Any) -> list[Any]:
    shared: list[Any] = [None] * RANKS
    dist.all_gather_object(shared, mine)
    return shared


def run_rank(rank: int, port: int, sides: list[int], rounds: int, results: Any) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    shared_memory = connect(rank, RANKS, share)
    if shared_memory is None:
        raise SystemExit("shared memory is not available here: there is nothing to compare")
    times = {}
    for side in sides:
        row = torch.randn(row_elements(side), generator=torch.Generator().manual_seed(rank))
        if not torch.equal(shared_memory(row), gloo_gather(row)):
            raise SystemExit(f"the two ways differ at {side} px")
        times |= measure(side, row, {"gloo": gloo_gather, "shared": shared_memory}, shared_memory, rounds)
    results.put(times)
    dist.destroy_process_group()


def measure(side: int, row: torch.Tensor, ways: dict[str, Gather], meet: Gather, rounds: int) -> Times:
    """The first tenth of the rounds only warms up."""
    times: Times = {(side, name): [] for name in ways}
    for _ in range(rounds + rounds // 10):
        for name, gather in ways.items():
            meet(row[:1])
            began = time.perf_counter()
            gather(row)
            times[side, name].append(time.perf_counter() - began)
    return {key: taken[-rounds:] for key, taken in times.items()}


def percentile(taken: list[float], share_below: float) -> float:
    return 1e6 * sorted(taken)[int(share_below * (len(taken) - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 512, 1024], help="pixels of a side")
    parser.add_argument("--rounds", type=int, default=2000, help="measured exchanges of each kind and size")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=run_rank, args=(rank, port, args.sizes, args.rounds, results), daemon=True)
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    by_rank: list[Times] = [results.get() for _ in ranks]
    for process in ranks:
        process.join()
    print("| size | row, KB | gloo p50, us | p99 | shared memory p50, us | p99 | p50 ratio | p99 ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for side in args.sizes:
        gloo, shared = (
            [max(both) for both in zip(*(times[side, name] for times in by_rank), strict=True)]
            for name in ("gloo", "shared")
        )
        figures = [percentile(taken, q) for taken in (gloo, shared) for q in (0.5, 0.99)]
        print(
            f"| {side} px | {row_elements(side) * 4 / 1024:.0f} | {figures[0]:.0f} | {figures[1]:.0f} "
            f"| {figures[2]:.0f} | {figures[3]:.0f} | {figures[0] / figures[2]:.1f} | {figures[1] / figures[3]:.1f} |"
        )


if __name__ == "__main__":
    main()
