"""What a burst of arrivals and endings costs those who run: encodes and decodes beside the steps, against inside them.

    python -m benchmarks.burst [--quick] [--model emoji] [--burst 8] [--out DIR]

One guided request takes its steps. Half-way every rank is given `--burst` texts to encode and one image to decode, as
a burst would bring them, and nothing else of the burst. "beside": on the side threads, as the engine does it. "inside":
at once, before the next step, as engines do that have no such threads. The table gives the longest step, in steps as
they are without a burst, and what the whole burst adds to the running request, in the same unit.

It hands the work to every rank's runner, so it knows the names of `worker/runner.py` and `worker/side_work.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec

from benchmarks.common import engine, equal_jobs, generate, interleave, machine, model_folder, on_ranks, report, start
from vllm_cfg_plugin import DiffusionLLM

STEPS = 80
COLUMNS = (
    "side",
    "burst",
    "ms per step",
    "its work, ms per rank",
    "longest step, beside",
    "longest step, inside",
    "steps added in all, beside",
    "steps added in all, inside",
)


def _install(worker: Any) -> None:
    """Note when each step of this rank begins and ends, and bring the burst with the step that is asked for."""
    runner = worker.runner
    carry_out = runner.start
    worker.step_spans, worker.burst = [], None

    def start(plan: Any) -> None:
        if worker.burst is not None and len(worker.step_spans) == STEPS // 2:
            burst, worker.burst = worker.burst, None
            burst()
        began = time.monotonic()
        carry_out(plan)
        if plan.advance:
            worker.step_spans.append((began, time.monotonic()))

    runner.start = start


def _arm(worker: Any, side: int, texts: int, beside: bool, number: int) -> None:
    """The next request meets a burst; its prompts are always new, because embeddings are cached."""
    runner = worker.runner

    def encode(text: int) -> None:
        prompt = f"a house with {text} windows, seen {number} times at {side} px"
        request = msgspec.structs.replace(next(iter(runner.states.values())).request, prompts=[prompt])
        runner.beside.embeddings.get(request.embeds_key(0), lambda: runner.pipeline.encode_branch(request, 0))

    def decode() -> Any:
        state = next(iter(runner.states.values()))
        return runner.pipeline.decode(state.latents, state.request)

    def burst() -> None:
        began = time.monotonic()
        for text in range(texts):
            if beside:
                runner.side.encode(-1, 0, lambda text=text: encode(text))
            else:
                encode(text)
        if beside:
            runner.side.decode(-1, decode)
        else:
            decode()
        worker.burst_ms = 1e3 * (time.monotonic() - began)

    worker.burst = burst


def _take(worker: Any) -> tuple[list[tuple[float, float]], float]:
    spans, worker.step_spans = worker.step_spans, []
    return spans, getattr(worker, "burst_ms", 0.0)


def steps_of(llm: DiffusionLLM, side: int, number: int, arm: Callable[[], None]) -> tuple[list[float], float]:
    """Milliseconds from each step's end to the next one's, on rank 0; and those of the burst if it ran at once."""
    arm()
    generate(llm, equal_jobs(1, side, STEPS, True, number))
    spans, burst_ms = on_ranks(llm, _take)[0]
    return [1e3 * (later[1] - earlier[1]) for earlier, later in pairwise(spans)], burst_ms


def row(llm: DiffusionLLM, side: int, texts: int, rounds: int) -> tuple[int | float, ...]:
    def contestant(arm: Callable[[int], None]) -> Callable[[int], tuple[list[float], float]]:
        return lambda number: steps_of(llm, side, number, lambda: arm(number))

    taken = interleave(
        {
            "none": contestant(lambda number: None),
            "beside": contestant(lambda number: on_ranks(llm, _arm, side, texts, True, 2 * number) and None),
            "inside": contestant(lambda number: on_ranks(llm, _arm, side, texts, False, 2 * number + 1) and None),
        },
        rounds,
    )
    step = statistics.median(ms for steps, _ in taken["none"] for ms in steps)
    alone = statistics.median(sum(steps) for steps, _ in taken["none"])
    longest = {name: statistics.median(max(steps) for steps, _ in taken[name]) / step for name in taken}
    added = {name: (statistics.median(sum(steps) for steps, _ in taken[name]) - alone) / step for name in taken}
    work = statistics.median(burst_ms for _, burst_ms in taken["inside"])
    return (side, texts, step, work, longest["beside"], longest["inside"], added["beside"], added["inside"])


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--model", default="emoji", help="emoji, light or mid (default emoji)")
    parser.add_argument("--burst", type=int, default=8, help="texts that every rank encodes (default 8)")
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.quick else 7)
    on = machine()
    with model_folder(args.model) as folder, engine(folder, 2) as llm:
        on_ranks(llm, _install)
        rows = [row(llm, side, args.burst, rounds) for side in ((64,) if args.quick else (64, 128, 256))]
    report("burst", args.out, on, COLUMNS, rows)


if __name__ == "__main__":
    main()
