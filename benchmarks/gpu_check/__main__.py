"""Everything that a GPU can tell of the step loop: `make gpu`.

    python -m benchmarks.gpu_check [--out DIR] [--layers 20] [--only speed] [--tiny]

Environment; attention of several sequences; parity of every family with diffusers on the same device, and alone against
batched bit for bit; milliseconds a step against diffusers'; one and two ranks; a profiled step; memory beside its plan.
Writes gpu_check.json and gpu_check.html. Without a GPU, or with --tiny, the same in seconds, to see that it runs. Exit
code 1: something failed. It needs torch and diffusers; vLLM need not be installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu_check.page import write_page
from benchmarks.gpu_check.profile import memory, profile
from benchmarks.gpu_check.ranks import two_ranks
from benchmarks.gpu_check.sections import Row, Scale, attention, environment, parity, speed
from vllm_cfg_plugin.pipelines.common import fused

SECTIONS: dict[str, Callable[[Scale], Iterator[Row]]] = {
    "environment": environment,
    "attention": attention,
    "parity": parity,
    "speed": speed,
    "ranks": two_ranks,
    "profile": profile,
    "memory": memory,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--layers", type=int, default=20, help="of a Qwen-Image of real width; the real one has 60")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="may be repeated")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes; so it is without a GPU")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # as on a rank: with more, a row's result depends on how the work was split
    else:
        fused.enable()  # as a server does
    scale = _scale(args.tiny or not torch.cuda.is_available(), args.layers)
    results: dict[str, list[Row]] = {}
    for name in args.only or SECTIONS:
        began = time.monotonic()
        results[name] = rows = []
        try:
            rows.extend(SECTIONS[name](scale))
        except Exception as error:  # the other sections still tell something
            rows.append({"failed": f"{type(error).__name__}: {error}"})
        for row in rows:
            print(
                name,
                *(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()),
            )
        print(f"{name}: {time.monotonic() - began:.1f} s\n", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu_check.json").write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")
    title = f"The step loop on {results.get('environment', [{}])[0].get('card', scale.device.type)}"
    (args.out / "gpu_check.html").write_text(write_page(results, title), encoding="utf-8")
    return int(any("failed" in row for name, rows in results.items() if name != "ranks" for row in rows))


def _scale(is_tiny: bool, layers: int) -> Scale:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    if is_tiny:
        return Scale(device, dtypes, (64,), (1, 2), layers=2, is_tiny=True, repeats=2, families=1)
    return Scale(device, dtypes, (256, 512, 1024, 1536), (1, 2, 4, 8), layers, is_tiny=False, repeats=5, families=99)


if __name__ == "__main__":
    sys.exit(main())
