"""What is checked, section by section: each returns rows, {column: value}."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F

from benchmarks.gpu_check import models
from benchmarks.gpu_check.loop import Loop, finish, synchronize
from tests.families import FAMILIES, SEED, call
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.pipelines.common import fused
from vllm_cfg_plugin.pipelines.registry import pipeline_class

Row = dict[str, Any]
GIB = 2**30


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        dtypes: that parity is looked at in; the last one is that of times.
        sides: pixels. counts: guided requests at a time.
        layers: of the model whose steps are timed. is_tiny: it is narrow as well.
        repeats: of everything that is timed.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    sides: tuple[int, ...]
    counts: tuple[int, ...]
    layers: int
    is_tiny: bool
    repeats: int
    families: int

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[-1]


def environment(scale: Scale) -> Iterator[Row]:
    """Where this runs."""
    row: Row = {"torch": torch.__version__, "diffusers": diffusers.__version__, "device": scale.device.type}
    if scale.device.type == "cuda":
        properties = torch.cuda.get_device_properties(scale.device)
        row |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "GiB": round(properties.total_memory / GIB, 1),
            "cards": torch.cuda.device_count(),
            "CUDA": torch.version.cuda,
        }
    yield row


def attention(scale: Scale) -> Iterator[Row]:
    """Attention of several sequences at once: how long, how exact, and whether a sequence depends on the others."""
    heads, dim = (2, 16) if scale.is_tiny else (24, 128)
    cases = {"one": [4096 + 64], "equal": [1024 + 64] * 8, "mixed": [4096 + 64, 1024 + 64, 256 + 64]}
    for name, lengths in cases.items():
        lengths = [max(8, length // (64 if scale.is_tiny else 1)) for length in lengths]
        torch.manual_seed(0)
        streams = torch.randn(3, sum(lengths), heads, dim).to(scale.device, scale.dtype)
        exact = _sdpa(*streams.float(), lengths)
        for way, attend in _ways(scale).items():
            row: Row = {"sequences": name, "way": way}
            try:
                out = attend(*streams, lengths)
                first = attend(*streams[:, : lengths[0]], lengths[:1])
                row |= {
                    "ms": milliseconds(partial(attend, *streams, lengths), scale),
                    "error": ((out.float() - exact).norm() / exact.norm()).item(),
                    "alone = together": torch.equal(first, out[: lengths[0]]),
                }
            except (RuntimeError, NotImplementedError, ImportError) as error:
                row["failed"] = _one_line(error)
            yield row


def _ways(scale: Scale) -> dict[str, Callable[..., torch.Tensor]]:
    ways: dict[str, Callable[..., torch.Tensor]] = {"one by one": _sdpa}
    if scale.device.type == "cuda":
        ways["torch varlen"] = _varlen
    return ways


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    parts = (x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value))
    out = [F.scaled_dot_product_attention(*(part[None] for part in own))[0] for own in zip(*parts, strict=True)]
    return torch.cat(out, dim=1).transpose(0, 1)


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths]).cumsum(0).to(query.device, torch.int32)
    out: Any = varlen_attn(query, key, value, ends, ends, max(lengths), max(lengths))
    return out


def parity(scale: Scale) -> Iterator[Row]:
    """Every family's final latents against diffusers' own on this device, and alone against batched, bit for bit."""
    for family in FAMILIES[: scale.families]:
        for dtype in scale.dtypes:
            row: Row = {"family": family.label, "dtype": str(dtype).removeprefix("torch.")}
            try:
                row |= _parity_of(family, dtype, scale.device)
            except Exception as error:  # the next family may do
                row["failed"] = _one_line(error)
            yield row


def _parity_of(family: Any, dtype: torch.dtype, device: torch.device) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        model = family.build(Path(folder) / "model")
        requests = family.requests(model)
        ours = pipeline_class(Checkpoint(str(model))).load(str(model), dtype=dtype, device=device)
        reference = family.reference(model, dtype).to(device)
        batched = finish(ours, requests)
        alone = [finish(ours, [request])[0] for request in requests]
        differences = []
        for number, (case, latents) in enumerate(zip(family.cases, batched, strict=True)):
            expected = call(reference, case, SEED + number)
            got = family.to_reference(ours, latents, requests[number])
            differences.append((got.float() - expected.float()).abs().max().item())
        same = all(torch.equal(one, other) for one, other in zip(alone, batched, strict=True))
        return {"max abs diff to diffusers": max(differences), "alone = batched": same}


def speed(scale: Scale) -> Iterator[Row]:
    """Milliseconds a step of guided requests: ours, as it is, compiled, and quantized; and diffusers' own.

    That is one by one and as one batch, and compiled too.
    """
    on_cpu, on_gpu = (("ours", ""), ("ours, int8", "int8")), (("ours, -O0", ""), ("ours", ""), ("ours, fp8", "fp8"))
    for who, quantization in on_gpu if scale.device.type == "cuda" else on_cpu:
        if scale.device.type == "cuda":
            fused.enable("-O0" not in who)
        pipeline = models.ours(_transformer(scale), quantization)
        for side in scale.sides:
            for count in scale.counts:
                row: Row = {"side": side, "requests": count, "who": who}
                with suppress(torch.OutOfMemoryError):
                    row |= _steps_of(pipeline, count, side, scale)
                yield row
        del pipeline
    reference = models.diffusers_own(_transformer(scale))
    for is_compiled in (False, True) if scale.device.type == "cuda" else (False,):
        if is_compiled:
            reference.transformer.compile_repeated_blocks(dynamic=True)
        suffix = ", compiled" * is_compiled
        for side in scale.sides:
            for count in scale.counts:
                with suppress(torch.OutOfMemoryError):
                    one, batch = (_diffusers_ms(reference, n, side, scale) for n in (1, count))
                    yield {"side": side, "requests": count, "who": f"diffusers one by one{suffix}", "ms": count * one}
                    yield {"side": side, "requests": count, "who": f"diffusers as one batch{suffix}", "ms": batch}


def _steps_of(pipeline: Any, count: int, side: int, scale: Scale) -> Row:
    loop = Loop(pipeline)
    loop.admit(models.requests(count, side, steps=1000))
    for _ in range(3):
        loop.step()
    if scale.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(scale.device)
        before = torch.cuda.memory_allocated(scale.device)
    row: Row = {"ms": milliseconds(loop.step, scale)}
    if scale.device.type == "cuda":
        row["peak GiB"] = (torch.cuda.max_memory_allocated(scale.device) - before) / GIB
    loop.close()
    return row


def _diffusers_ms(pipeline: Any, count: int, side: int, scale: Scale) -> float:
    """Milliseconds a step, from two runs of different length."""
    texts = [
        torch.stack([models.random_text(pipeline.transformer, seed, branch) for seed in range(count)])
        for branch in range(2)
    ]
    mask = torch.ones(texts[0].shape[:2], dtype=torch.long, device=scale.device)

    def run(steps: int) -> float:
        synchronize(scale.device)
        began = time.perf_counter()
        pipeline(
            prompt_embeds=texts[0],
            prompt_embeds_mask=mask,
            negative_prompt_embeds=texts[1],
            negative_prompt_embeds_mask=mask,
            true_cfg_scale=models.SCALE,
            height=side,
            width=side,
            num_inference_steps=steps,
            output_type="latent",
        )
        synchronize(scale.device)
        return 1e3 * (time.perf_counter() - began)

    run(2)
    steps = 2 + scale.repeats
    return (run(2 + steps) - run(2)) / steps


def _transformer(scale: Scale) -> Any:
    return models.transformer(scale.layers, scale.is_tiny, scale.dtype, scale.device)


def milliseconds(run: Callable[[], object], scale: Scale) -> float:
    """The median of some runs, each waited for."""
    run()
    times = []
    for _ in range(scale.repeats):
        synchronize(scale.device)
        began = time.perf_counter()
        run()
        synchronize(scale.device)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
