"""One guided request: two cfg ranks against one, and a hand-made two-process loop against diffusers' own pipeline.

    python -m benchmarks.cfg_speedup [--quick] [--model emoji:128 --model mid:256] [--steps 50] [--rounds 5] [--out DIR]

All run the same request in every round, one after the other. One rank packs both branches into one forward, which costs
less than two where reading the weights is the limit; "in turn" is one rank without that. Everything computes with one
thread per process, and rank r, of the engines and of the hand-made loop, is bound to core r. The hand-made loop is what
one writes in an afternoon: diffusers' transformer and noise scheduler in two processes with a gloo all_gather per step.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from benchmarks.common import (
    Job,
    Timing,
    engine,
    equal_jobs,
    generate,
    interleave,
    machine,
    median_timing,
    model_folder,
    on_ranks,
    report,
    start,
)
from benchmarks.rivals import diffusers_process, hand_made_pair

DEFAULT_MODELS = ["emoji:128", "emoji:256", "mid:256"]  # about 10 ms, 50 ms and 40 ms per forward of ours
COLUMNS = (
    "model",
    "diffusers' ms per forward",
    "ms per step of cfg 2",
    "denoise ms: cfg 1",
    "cfg 2",
    "speed-up",
    "cfg 1, branches in turn",
    "speed-up over that",
    "sequential diffusers",
    "hand-made",
    "its speed-up",
    "hand-made / cfg 2",
    "e2e ms: cfg 1",
    "e2e cfg 2",
    "e2e speed-up",
    "e2e hand-made",
)
Row = tuple[str | float, ...]


def _forward_in_turn(worker: Any) -> None:
    """Forward the two branches one after the other, as every other system does on one rank, not in one pack."""
    forwards = worker.runner._forwards
    together = forwards.predict
    forwards.predict = lambda inputs: [outcome for branch in inputs for outcome in together([branch])]


def measure(model: str, side: int, steps: int, rounds: int) -> dict[str, Timing]:
    """Median timings of the five contestants."""

    def job(number: int) -> Job:
        return equal_jobs(1, side, steps, True, number)[0]

    with ExitStack() as stack:
        folder = stack.enter_context(model_folder(model))
        sequential = stack.enter_context(diffusers_process(folder, threads=1))
        pair = stack.enter_context(hand_made_pair(folder))
        one = stack.enter_context(engine(folder, 1))
        in_turn = stack.enter_context(engine(folder, 1))
        on_ranks(in_turn, _forward_in_turn)
        two = stack.enter_context(engine(folder, 2))
        contestants = {
            "cfg 1": lambda number: generate(one, [job(number)]),
            "in turn": lambda number: generate(in_turn, [job(number)]),
            "cfg 2": lambda number: generate(two, [job(number)]),
            "sequential": lambda number: sequential.run([job(number)]),
            "hand-made": lambda number: pair(job(number)),
        }
        return {name: median_timing(timings) for name, timings in interleave(contestants, rounds).items()}


def row(label: str, steps: int, median: dict[str, Timing]) -> Row:
    one, in_turn, two, sequential, pair = median.values()
    return (
        label,
        sequential.denoise_ms / (2 * steps),
        two.denoise_ms / steps,
        one.denoise_ms,
        two.denoise_ms,
        one.denoise_ms / two.denoise_ms,
        in_turn.denoise_ms,
        in_turn.denoise_ms / two.denoise_ms,
        sequential.denoise_ms,
        pair.denoise_ms,
        sequential.denoise_ms / pair.denoise_ms,
        pair.denoise_ms / two.denoise_ms,
        1e3 * one.seconds,
        1e3 * two.seconds,
        one.seconds / two.seconds,
        1e3 * pair.seconds,
    )


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--model", action="append", help=f"MODEL:PIXELS, repeatable (default {DEFAULT_MODELS})")
    parser.add_argument("--steps", type=int, help="denoising steps (default 50, Qwen-Image's own)")
    args = parser.parse_args()
    steps = args.steps or (8 if args.quick else 50)
    rounds = args.rounds or (2 if args.quick else 5)
    on = machine()
    rows = []
    for label in args.model or DEFAULT_MODELS:
        model, _, side = label.partition(":")
        rows.append(row(label, steps, measure(model, int(side), steps, rounds)))
    report("cfg_speedup", args.out, on, COLUMNS, rows)


if __name__ == "__main__":
    main()
