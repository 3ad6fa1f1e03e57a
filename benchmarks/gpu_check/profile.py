"""One steady step under torch's profiler: kernels, how long the GPU idles, and where the host waits for it."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu_check import models
from benchmarks.gpu_check.loop import Loop, synchronize
from benchmarks.gpu_check.sections import GIB, Row, Scale

_STEPS = 3


def profile(scale: Scale) -> Iterator[Row]:
    """Of one guided request and of several, at the smallest and the largest size."""
    model = models.transformer(scale.layers, scale.is_tiny, scale.dtype, scale.device)
    pipeline = models.ours(model)
    for side in dict.fromkeys((scale.sides[0], scale.sides[-1])):
        for count in dict.fromkeys((scale.counts[0], scale.counts[-1])):
            loop = Loop(pipeline)
            loop.admit(models.requests(count, side, steps=1000))
            for _ in range(3):
                loop.step()
            yield {"side": side, "requests": count, **_one_profile(loop, scale)}
            loop.close()


def _one_profile(loop: Loop, scale: Scale) -> Row:
    waits = _waits(loop, scale)
    on_gpu = scale.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    synchronize(scale.device)
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(_STEPS):
            loop.step()
        synchronize(scale.device)
    events: Any = recorded.events()
    names = Counter(event.name for event in events)
    spans = [(e.time_range.start, e.time_range.end) for e in events if str(e.device_type).endswith("CUDA")]
    busiest = sorted(
        recorded.key_averages(), key=lambda e: e.self_device_time_total if on_gpu else e.self_cpu_time_total
    )
    return {
        "kernels a step": len(spans) / _STEPS,
        "launches a step": sum(n for name, n in names.items() if "LaunchKernel" in name) / _STEPS,
        "GPU idle": idle_share(spans) if spans else None,
        "host waits at": json.dumps(waits),
        "most time": ", ".join(event.key[:40] for event in busiest[:-4:-1]),
    }


def _waits(loop: Loop, scale: Scale) -> dict[str, int]:
    """{file:line: times a step} of operations for which the host waits for the GPU."""
    if scale.device.type != "cuda":
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.step()
    torch.cuda.set_sync_debug_mode("default")
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message)))


def idle_share(spans: Sequence[tuple[float, float]]) -> float:
    """The share of the time from the first span's start to the last one's end that no span covers."""
    ordered = sorted(spans)
    busy, end = 0.0, ordered[0][0]
    for start, stop in ordered:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - ordered[0][0])


def memory(scale: Scale) -> Iterator[Row]:
    """What a forward takes beside the weights, counted as `vllm_cfg_plugin.memory` counts, and measured."""
    from vllm_cfg_plugin.memory.tracking import peak_bytes
    from vllm_cfg_plugin.pipelines.base import BranchInput, generator_of

    def forward(device: torch.device, count: int, side: int) -> None:
        pipeline = models.ours(models.transformer(2, scale.is_tiny, scale.dtype, device))
        branches = [
            BranchInput(
                request,
                pipeline.draw_noise(request, generator_of(request)),
                pipeline.encode_branch(request, 0),
                pipeline.make_noise_scheduler(request).timesteps[0],
            )
            for request in models.requests(count, side, steps=4)
        ]
        arguments = pipeline.pack_branches(branches)
        with torch.inference_mode():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before.append(torch.cuda.memory_allocated(device))
            pipeline.predict_noise(**arguments)

    for side in scale.sides:
        before: list[int] = []
        with peak_bytes(torch.device("meta")) as counted, torch.inference_mode():
            forward(torch.device("meta"), 1, side)
        row: Row = {"side": side, "counted GiB": counted.peak / GIB}
        if scale.device.type == "cuda":
            forward(scale.device, 1, side)
            row["measured GiB"] = (torch.cuda.max_memory_allocated(scale.device) - before[0]) / GIB
        yield row
