"""What adapters cost a step: 16 requests that carry 16 different ones of rank 16, against the same without.

    python -m benchmarks.lora [--models emoji mid] [--sides 128 256] [--adapters 16] [--rank 16] [--rounds 9]

The packed forward of one rank, which is all of a step that adapters change, in CPU time of its thread: requests without
guidance, each at the first step. Contestants take turns. "Attention" adapts the projections of attention, as most
trainers do by default; "and MLP" those of the MLPs too; "all" every layer that requests can adapt.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import equal_jobs, interleave, machine, model_folder, report, start
from tests.adapters import make_adapter
from tests.contract import branches_of, make_request
from tests.families import load
from vllm_cfg_plugin.pipelines.adapter_files import find_adapter
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline
from vllm_cfg_plugin.pipelines.common.generate import predict
from vllm_cfg_plugin.worker.adapters import AdapterLimits, AdapterStore

COLUMNS = ("model", "px", "ms: none", "attention", "and MLP", "all", "attention / none", "and MLP / none", "all / none")
LAYERS = {"attention": (".attn.",), "and MLP": (".attn.", "_mlp."), "all": ("",)}

Branches = list[BranchInput]


def carrying(pipeline: EnginePipeline, branches: Branches, kind: str, rank: int) -> Branches:
    """The branches, each with an adapter of its own."""
    store = AdapterStore(pipeline, AdapterLimits(rank, len(branches), len(branches)))
    adapted = []
    with tempfile.TemporaryDirectory(prefix="benchmark-lora-") as folder:
        for seed, branch in enumerate(branches):
            path = Path(folder) / f"{seed}.safetensors"
            make_adapter(path, pipeline.transformer, seed, rank=rank, layers=LAYERS[kind])
            carried = store.carried([find_adapter(f"{kind} {seed}", str(path))])
            adapted.append(dataclasses.replace(branch, carried=carried))
    return adapted


def forward_ms(pipeline: EnginePipeline, branches: Branches, _: int) -> float:
    """CPU milliseconds of the thread."""
    began = time.thread_time()
    with torch.inference_mode():
        predict(pipeline, branches)
    return 1e3 * (time.thread_time() - began)


def measure(folder: str, side: int, count: int, rank: int, rounds: int) -> list[float]:
    """Median milliseconds of each contestant."""
    pipeline = load(Path(folder))
    branches: Branches = []
    with torch.inference_mode():
        for job in equal_jobs(count, side, 8, False, 0):
            request = make_request(folder, job.prompt, height=side, width=side, seed=job.seed, true_cfg_scale=1.0)
            branches += branches_of(pipeline, request)
    contestants = {"none": branches} | {kind: carrying(pipeline, branches, kind, rank) for kind in LAYERS}
    runs = {kind: partial(forward_ms, pipeline, own) for kind, own in contestants.items()}
    return [median(taken) for taken in interleave(runs, rounds).values()]


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--models", nargs="+", default=["emoji", "mid"], help="emoji, or sizes of tests")
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256], help="pixels")
    parser.add_argument("--adapters", type=int, default=16, help="requests, each with an adapter of its own")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    args = parser.parse_args()
    sides, rounds = args.sides[:1] if args.quick else args.sides, args.rounds or (2 if args.quick else 9)
    on, rows = machine(), []
    for model in args.models:
        with model_folder(model) as folder:
            for side in sides:
                none, *adapted = measure(folder, side, args.adapters, args.rank, rounds)
                rows.append((model, side, none, *adapted, *(taken / none for taken in adapted)))
    report("lora", args.out, on, COLUMNS, rows)


if __name__ == "__main__":
    main()
