"""What CFG-Parallel and step batching gain: one rank, two ranks and diffusers' own pipeline, interleaved in one run.

    python benchmarks/cfg_parallel.py --model examples/models/emoji --size 64 --size 256 --batch 1 --batch 8

All contestants run the same guided requests, one after the other in every round, so that a noisy machine disturbs them
alike; medians over the rounds and ratios of medians are printed. "One device" is one core: a rank's process and
diffusers' pipeline each compute with one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import QwenImagePipeline

from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

PROMPT = "a rocket on a black background"
Contestant = Callable[[int, int, int], None]  # (side in pixels, batch, steps)


def engine(llm: DiffusionLLM) -> Contestant:
    def run(side: int, batch: int, steps: int) -> None:
        params = [
            DiffusionParams(
                height=side, width=side, num_inference_steps=steps, true_cfg_scale=4.0, negative_prompt=" ", seed=seed
            )
            for seed in range(batch)
        ]
        outputs = llm.generate([PROMPT] * batch, params, use_tqdm=False)
        failed = [output.error for output in outputs if output.error]
        if failed:
            raise RuntimeError(failed[0])

    return run


def diffusers_list(pipeline: QwenImagePipeline) -> Contestant:
    """diffusers' way to batch: a list of prompts that share size, steps and scale."""

    def run(side: int, batch: int, steps: int) -> None:
        pipeline(
            prompt=[PROMPT] * batch,
            negative_prompt=[" "] * batch,
            true_cfg_scale=4.0,
            height=side,
            width=side,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in range(batch)],
        )

    return run


def measure(contestants: dict[str, Contestant], side: int, batch: int, steps: int, rounds: int) -> dict[str, float]:
    """Median seconds of each contestant; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            run(side, batch, steps)
            if round_number:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/models/emoji", help="a Qwen-Image diffusers folder")
    parser.add_argument("--size", type=int, action="append", help="pixels of a side; repeatable (default 64)")
    parser.add_argument("--batch", type=int, action="append", help="requests at once; repeatable (default 1 and 8)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reference = QwenImagePipeline.from_pretrained(args.model)
    reference.set_progress_bar_config(disable=True)
    with DiffusionLLM(args.model, cfg_parallel_size=1) as one, DiffusionLLM(args.model, cfg_parallel_size=2) as two:
        contestants = {"diffusers": diffusers_list(reference), "1 rank": engine(one), "2 ranks": engine(two)}
        print("| size | batch | diffusers s | 1 rank s | 2 ranks s | 2 ranks : 1 rank | 2 ranks : diffusers |")
        print("|---|---|---|---|---|---|---|")
        for side in args.size or [64]:
            for batch in args.batch or [1, 8]:
                median = measure(contestants, side, batch, args.steps, args.rounds)
                alone, both, theirs = median["1 rank"], median["2 ranks"], median["diffusers"]
                print(
                    f"| {side} px | {batch} | {theirs:.3f} | {alone:.3f} | {both:.3f} | {alone / both:.2f}x faster "
                    f"| {theirs / both:.2f}x faster |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
