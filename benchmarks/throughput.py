"""Images per second of equal requests: guided ones against diffusers' list of prompts, unguided ones on 2 ranks and 1.

    python -m benchmarks.throughput [--quick] [--model emoji --model mid] [--size 64] [--steps 20] [--rounds 9]
                                    [--out DIR]

The list of prompts is the batching that diffusers has: one pipeline call for prompts that agree in size, steps and
scale, here in a process with 2 threads on the same two cores. Our ranks compute with one thread each. One contestant
runs at a time, and all of them run in every round. Times include encoding and decoding.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack

from benchmarks.common import (
    Job,
    Timing,
    engine,
    equal_jobs,
    generate,
    interleave,
    machine,
    model_folder,
    report,
    start,
)
from benchmarks.rivals import diffusers_process

GUIDED, UNGUIDED = 8, 16  # requests at once
COLUMNS = (
    "model",
    f"{GUIDED} guided: 2 ranks, images/s",
    "diffusers' list of prompts",
    "gain",
    f"{UNGUIDED} unguided: 2 ranks, images/s",
    "1 rank",
    "speed-up",
)


def measure(model: str, side: int, steps: int, rounds: int) -> dict[str, float]:
    """Median images per second of the four contestants."""

    def guided(number: int) -> list[Job]:
        return equal_jobs(GUIDED, side, steps, True, number)

    def unguided(number: int) -> list[Job]:
        return equal_jobs(UNGUIDED, side, steps, False, number)

    with ExitStack() as stack:
        folder = stack.enter_context(model_folder(model))
        diffusers_list = stack.enter_context(diffusers_process(folder, threads=2))
        one = stack.enter_context(engine(folder, 1))
        two = stack.enter_context(engine(folder, 2))
        contestants = {
            "guided": lambda number: rate(GUIDED, generate(two, guided(number))),
            "list": lambda number: rate(GUIDED, diffusers_list.run(guided(number))),
            "two": lambda number: rate(UNGUIDED, generate(two, unguided(number))),
            "one": lambda number: rate(UNGUIDED, generate(one, unguided(number))),
        }
        return {name: statistics.median(rates) for name, rates in interleave(contestants, rounds).items()}


def rate(count: int, timing: Timing) -> float:
    return count / timing.seconds


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--model", action="append", help="emoji, light or mid; repeatable (default emoji and mid)")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side (default 64)")
    parser.add_argument("--steps", type=int, help="denoising steps (default 20)")
    args = parser.parse_args()
    steps = args.steps or (6 if args.quick else 20)
    rounds = args.rounds or (2 if args.quick else 9)
    on = machine()
    rows = []
    for model in args.model or ["emoji", "mid"]:
        r = measure(model, args.size, steps, rounds)
        label = f"{model}, {args.size} px"
        rows.append((label, r["guided"], r["list"], r["guided"] / r["list"], r["two"], r["one"], r["two"] / r["one"]))
    report("throughput", args.out, on, COLUMNS, rows)


if __name__ == "__main__":
    main()
