"""The same requests on one cfg rank and on two: milliseconds a step, and whether the latents are the same bits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.gpu_check import models
from benchmarks.gpu_check.loop import Loop, finish
from benchmarks.gpu_check.sections import Row, Scale, milliseconds

_STEPS = 4


def two_ranks(scale: Scale) -> Iterator[Row]:
    """Needs two GPUs, or a CPU, whose processes talk over gloo."""
    if scale.device.type == "cuda" and torch.cuda.device_count() < 2:
        yield {"ranks": 2, "failed": "there is one GPU"}
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (scale, Path(folder)), nprocs=2)
        by_two = torch.load(Path(folder) / "rows.pt")
    pipeline = models.ours(models.transformer(scale.layers, scale.is_tiny, scale.dtype, scale.device))
    for side in scale.sides:
        for count in scale.counts:
            loop = Loop(pipeline)
            loop.admit(models.requests(count, side, steps=1000))
            ms = milliseconds(loop.step, scale)
            loop.close()
            latents = finish(pipeline, models.requests(count, side, _STEPS))
            ms_of_two, latents_of_two = by_two[side, count]
            same = all(torch.equal(a.cpu(), b) for a, b in zip(latents, latents_of_two, strict=True))
            yield {"side": side, "requests": count, "1 rank ms": ms, "2 ranks ms": ms_of_two, "same bits": same}


def _rank(rank: int, scale: Scale, folder: Path) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if scale.device.type == "cuda" else scale.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

    def all_gather(row: torch.Tensor) -> torch.Tensor:
        gathered = row.new_empty(2, *row.shape)
        dist.all_gather_into_tensor(gathered.view(-1), row)
        return gathered

    pipeline = models.ours(models.transformer(scale.layers, scale.is_tiny, scale.dtype, device))
    found = {}
    for side in scale.sides:
        for count in scale.counts:
            loop = Loop(pipeline, rank, 2, all_gather)
            loop.admit(models.requests(count, side, steps=1000))
            ms = milliseconds(loop.step, scale)
            loop.close()
            loop = Loop(pipeline, rank, 2, all_gather)
            latents = loop.finish(models.requests(count, side, _STEPS))
            loop.close()
            found[side, count] = ms, [own.cpu() for own in latents]
    if rank == 0:
        torch.save(found, folder / "rows.pt")
    dist.destroy_process_group()
