"""When two processes should share a forward: one request of growing size, and many small ones, on two cores.

    python -m benchmarks.shared_forwards [--model mid] [--sides 64 128 256 512] [--steps 8] [--rounds 3] [--out DIR]

Contestants on the same two cores: one process; one cfg rank of two processes that share rows
(`--sequence-parallel-size 2`) or weights (`--tensor-parallel-size 2`); two cfg ranks, which share no forward. The
request has no guidance, so that it is one forward a step, which two cfg ranks can't divide; "8 at once" are such
requests together.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from benchmarks.common import (
    Timing,
    engine,
    equal_jobs,
    generate,
    interleave,
    machine,
    median_timing,
    model_folder,
    report,
    start,
)

COLUMNS = (
    "requests",
    "px",
    "denoise ms: one process",
    "rows shared",
    "speed-up",
    "weights shared",
    "speed-up",
    "two cfg ranks",
)
# (cfg ranks, processes of each that share rows, and weights)
CONTESTANTS = {"one": (1, 1, 1), "rows": (1, 2, 1), "weights": (1, 1, 2), "ranks": (2, 1, 1)}


def measure(folder: str, count: int, side: int, steps: int, rounds: int) -> dict[str, Timing]:
    """Median timings of the contestants."""

    def run(llm: object, number: int) -> Timing:
        return generate(llm, equal_jobs(count, side, steps, False, number))  # type: ignore[arg-type]

    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(engine(folder, ranks, sequence_parallel_size=rows, tensor_parallel_size=weights))
            for name, (ranks, rows, weights) in CONTESTANTS.items()
        }
        contestants = {name: partial(run, llm) for name, llm in engines.items()}
        return {name: median_timing(timings) for name, timings in interleave(contestants, rounds).items()}


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--model", default="mid", help="a size of the tests' Qwen-Image with an even number of heads")
    parser.add_argument("--sides", type=int, nargs="+", help="pixels (default 64 128 256 512)")
    parser.add_argument("--steps", type=int, help="denoising steps (default 8)")
    args = parser.parse_args()
    steps, rounds = args.steps or (3 if args.quick else 8), args.rounds or (1 if args.quick else 3)
    sides = args.sides or ([64, 256] if args.quick else [64, 128, 256, 512])
    on, rows = machine(), []
    with model_folder(args.model) as folder:
        for count, side in [(1, side) for side in sides] + [(8, 64)]:
            one, by_rows, by_weights, ranks = (
                t.denoise_ms for t in measure(folder, count, side, steps, rounds).values()
            )
            rows.append((count, side, one, by_rows, one / by_rows, by_weights, one / by_weights, ranks))
    report("shared_forwards", args.out, on, COLUMNS, rows)


if __name__ == "__main__":
    main()
