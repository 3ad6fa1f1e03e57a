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
from dataclasses import dataclass

import torch
from diffusers import QwenImagePipeline

from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

PROMPT = "a rocket on a black background"


@dataclass(frozen=True)
class Sample:
    """One call: seconds of the whole, and milliseconds per denoising step where the engine reports them."""

    seconds: float
    step_ms: float = 0.0


Contestant = Callable[[int, int, int], Sample]  # (side in pixels, batch, steps)


def engine(llm: DiffusionLLM) -> Contestant:
    def run(side: int, batch: int, steps: int) -> Sample:
        params = [
            DiffusionParams(
                height=side, width=side, num_inference_steps=steps, true_cfg_scale=4.0, negative_prompt=" ", seed=seed
            )
            for seed in range(batch)
        ]
        began = time.perf_counter()
        outputs = llm.generate([PROMPT] * batch, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        failed = [output.error for output in outputs if output.error]
        if failed:
            raise RuntimeError(failed[0])
        return Sample(seconds, max(output.metrics.denoise_ms for output in outputs) / steps)

    return run


def diffusers_list(pipeline: QwenImagePipeline) -> Contestant:
    """diffusers' way to batch: a list of prompts that share size, steps and scale."""

    def run(side: int, batch: int, steps: int) -> Sample:
        began = time.perf_counter()
        pipeline(
            prompt=[PROMPT] * batch,
            negative_prompt=[" "] * batch,
            true_cfg_scale=4.0,
            height=side,
            width=side,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in range(batch)],
        )
        return Sample(time.perf_counter() - began)

    return run


def measure(contestants: dict[str, Contestant], side: int, batch: int, steps: int, rounds: int) -> dict[str, Sample]:
    """Medians of each contestant; the first round only warms up."""
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, run in contestants.items():
            sample = run(side, batch, steps)
            if round_number:
                samples[name].append(sample)
    return {
        name: Sample(statistics.median(s.seconds for s in taken), statistics.median(s.step_ms for s in taken))
        for name, taken in samples.items()
    }


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
        print("| size | batch | ms per step, 1 rank | 2 ranks | speed-up | s in all, diffusers | 1 rank | 2 ranks |")
        print("|---|---|---|---|---|---|---|---|")
        for side in args.size or [64]:
            for batch in args.batch or [1, 8]:
                median = measure(contestants, side, batch, args.steps, args.rounds)
                one_rank, two_ranks = median["1 rank"], median["2 ranks"]
                print(
                    f"| {side} px | {batch} | {one_rank.step_ms:.1f} | {two_ranks.step_ms:.1f} "
                    f"| {one_rank.step_ms / two_ranks.step_ms:.2f} | {median['diffusers'].seconds:.2f} "
                    f"| {one_rank.seconds:.2f} | {two_ranks.seconds:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
