"""What the engine costs per step: 1, 32 and 256 running requests on ranks that do nothing, and the plan on the wire.

    python -m benchmarks.engine_overhead [--quick] [--rounds 3] [--out DIR]

Everything is real but the ranks' work: a rank answers each plan at once. The time between the starts of two steps on
rank 0 is then the engine's: receive, schedule, plan, send, collect. With ranks that sleep 5 ms a step, which stands for
a device that computes, the time between one step's end and the next one's start is what the engine adds to a step.

It replaces the rank's step by `_do_nothing`, so it knows the wire messages of `vllm_cfg_plugin.engine.plan`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks.common import engine, equal_jobs, generate, machine, model_folder, on_ranks, report, start
from vllm_cfg_plugin import DiffusionLLM
from vllm_cfg_plugin.engine import plan as wire

SIDE = 64
STEPS = 200
COUNTS = (1, 32, 256)
DEVICE_MS = 5.0
COLUMNS = (
    "running requests",
    "us per step, p50",
    "p90",
    "plan, bytes",
    f"us added to a {DEVICE_MS:g} ms step, p50",
    "p90 added",
)

Span = tuple[float, float, int, int]  # began, ended, requests forwarded, bytes of the plan


def _do_nothing(worker: Any, work_ms: float) -> None:
    """From now on this rank sleeps `work_ms` a step, computes nothing and answers every plan as if it had."""
    steps: list[tuple[float, float, int, wire.StepPlan]] = []
    running: set[int] = set()
    reports: list[wire.StepReport] = []
    blank = torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8)

    def start(plan: wire.StepPlan) -> None:
        began = time.perf_counter()
        running.update(assign.id for assign in plan.assign)
        if work_ms and plan.advance:
            time.sleep(work_ms / 1e3)
        steps.append((began, time.perf_counter(), len(running) if plan.advance else 0, plan))
        running.difference_update(plan.retire, (decode.id for decode in plan.decodes))
        for encode in plan.encodes:
            if encode.rank == worker.rank:
                worker.runner.side.deliver(wire.SideReport(encode.id, encode.branch, worker.rank, 0.0), None)
        for decode in plan.decodes:
            if decode.rank == worker.rank:
                report = wire.SideReport(decode.id, wire.DECODED, worker.rank, 0.0, "", (1, SIDE, SIDE, 3))
                worker.runner.side.deliver(report, blank)
        now = time.monotonic()
        reports.append(wire.StepReport(plan.step, worker.rank, now, now, []))

    def finished() -> list[wire.StepReport]:
        taken = reports[:]
        reports.clear()
        return taken

    worker.runner.start, worker.runner.finished = start, finished
    worker.steps_seen = steps


def _spans(worker: Any) -> list[Span]:
    """The steps since the last call; encoding the plans again tells their size without slowing the steps."""
    spans = [(began, ended, forwards, len(wire.encode(plan))) for began, ended, forwards, plan in worker.steps_seen]
    worker.steps_seen.clear()
    return spans


@dataclass(frozen=True)
class Steps:
    """Steady steps of one rank: all requests run and none comes or goes."""

    periods_us: list[float]
    gaps_us: list[float]
    plan_bytes: list[int]


def steady(spans: Sequence[Span], count: int) -> Steps:
    """Neighbouring steps that forward `count` requests each."""
    steps = Steps([], [], [])
    for (began, ended, forwards, size), (next_began, _, next_forwards, _) in pairwise(spans):
        if forwards == next_forwards == count:
            steps.periods_us.append(1e6 * (next_began - began))
            steps.gaps_us.append(1e6 * (next_began - ended))
            steps.plan_bytes.append(size)
    return steps


def measure(llm: DiffusionLLM, count: int, work_ms: float, rounds: int) -> Steps:
    """The steady steps of rank 0 over all rounds, without the first one."""
    on_ranks(llm, _do_nothing, work_ms)
    taken = Steps([], [], [])
    for number in range(rounds + 1):
        generate(llm, equal_jobs(count, SIDE, STEPS, True, number))
        steps = steady(on_ranks(llm, _spans)[0], count)
        if number:
            taken.periods_us.extend(steps.periods_us)
            taken.gaps_us.extend(steps.gaps_us)
            taken.plan_bytes.extend(steps.plan_bytes)
    return taken


def row(llm: DiffusionLLM, count: int, rounds: int) -> tuple[int | float, ...]:
    idle, busy = measure(llm, count, 0.0, rounds), measure(llm, count, DEVICE_MS, rounds)
    return (
        count,
        statistics.median(idle.periods_us),
        statistics.quantiles(idle.periods_us, n=10)[-1],
        statistics.mean(idle.plan_bytes),
        statistics.median(busy.gaps_us),
        statistics.quantiles(busy.gaps_us, n=10)[-1],
    )


def main() -> None:
    args = start(__doc__).parse_args()
    rounds = args.rounds or (1 if args.quick else 5)
    on = machine()
    with (
        model_folder("emoji") as folder,
        engine(folder, 2, max_num_seqs=max(COUNTS), max_num_batched_tokens=1_000_000) as llm,
    ):
        rows = [row(llm, count, rounds) for count in COUNTS]
    report("engine_overhead", args.out, on, COLUMNS, rows)


if __name__ == "__main__":
    main()
