"""Where a step's time goes on each rank: a timeline of a mixed batch, and a profile of steps with 5 ms forwards.

    python -m benchmarks.trace_steps [--quick] [--model emoji] --out DIR

Puts timers around the verbs of every rank's runner (`HOOKS`) and runs a mixed batch. Writes DIR/trace.json, which
chrome://tracing and ui.perfetto.dev open, and DIR/timeline.png, both with all ranks on one clock; prints, for that
batch and for one guided request of the light model at 64 px, how many ms of a step each verb takes.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Job,
    engine,
    equal_jobs,
    generate,
    machine,
    model_folder,
    on_ranks,
    report,
    start,
)
from vllm_cfg_plugin import DiffusionLLM

STEP = "step"
# (attribute path from the worker, label); a hook inside another is subtracted from it. "exchange" is the collective,
# the wait for a slower rank included.
HOOKS = (
    ("runner.start", STEP),
    ("runner._admit", "admit"),
    ("runner._held.line_up", "line up"),
    ("runner._step._forward", "forward"),
    ("runner._step._all_gather", "exchange"),
    ("runner._step._advance", "advance"),
    ("runner.beside.encode", "encode"),
    ("runner.beside.decode", "decode"),
)
BESIDE = ("encode", "decode")  # on threads of their own, beside the steps
COLOURS = {
    STEP: "0.75",
    "admit": "tab:brown",
    "line up": "tab:olive",
    "forward": "tab:blue",
    "exchange": "tab:red",
    "advance": "tab:orange",
    "encode": "tab:purple",
    "decode": "tab:green",
}
REST, NO_PLAN = "rest of the step", "between two steps"
LABELS = [*(label for _, label in HOOKS if label not in (STEP, *BESIDE)), REST, NO_PLAN]
COLUMNS = ("batch", "rank", "steps", "ms per step", *LABELS, *(f"beside: {label}" for label in BESIDE))

Event = tuple[str, float, float]  # label, began, ended: seconds of the machine's monotonic clock


def _install_timers(worker: Any) -> None:
    """Wrap every hook of this rank; the events gather in a list of the worker."""
    events: list[Event] = []

    def timed(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                events.append((label, began, time.monotonic()))

        return wrapper

    for path, label in HOOKS:
        *owners, name = path.split(".")
        owner = worker
        for attribute in owners:
            owner = getattr(owner, attribute)
        setattr(owner, name, timed(getattr(owner, name), label))
    worker.trace_events = events


def _take_events(worker: Any) -> list[Event]:
    taken = list(worker.trace_events)
    worker.trace_events.clear()
    return taken


def mixed_jobs(warm_up: bool) -> list[Job]:
    """Half of them guided, three sizes, four step counts; the warm-up's prompts differ, so nothing is cached."""
    background = "blue" if warm_up else "black"
    sides, steps = (64, 128, 192), (4, 8, 12, 16)
    return [
        Job(f"a panda on a {background} background, {n}", sides[n % 3], steps[n % 4], guided=n % 2 == 0, seed=n)
        for n in range(10)
    ]


def self_seconds(events: Iterable[Event]) -> dict[str, float]:
    """Seconds per label of one rank, without what other hooks inside took."""
    seconds: dict[str, float] = defaultdict(float)
    enclosing: list[Event] = []
    for event in sorted(events, key=lambda event: (event[1], -event[2])):
        label, began, ended = event
        while enclosing and enclosing[-1][2] <= began:
            enclosing.pop()
        if enclosing:
            seconds[enclosing[-1][0]] -= ended - began
        seconds[label] += ended - began
        enclosing.append(event)
    return dict(seconds)


def profile(events: Sequence[Event]) -> list[float]:
    """Milliseconds per step of one rank, in the order of LABELS; they add up to the time from step to step."""
    steps = sorted((began, ended) for label, began, ended in events if label == STEP)
    seconds = self_seconds(event for event in events if event[0] not in BESIDE)
    seconds[REST] = seconds.pop(STEP)
    seconds[NO_PLAN] = sum(later[0] - earlier[1] for earlier, later in pairwise(steps))
    return [1e3 * seconds.get(label, 0.0) / len(steps) for label in LABELS]


def profile_rows(what: str, ranks: Sequence[Sequence[Event]]) -> list[tuple[str | int | float, ...]]:
    rows = []
    for rank, events in enumerate(ranks):
        milliseconds = profile(events)
        steps = sum(label == STEP for label, _, _ in events)
        beside = [sum(1e3 * (end - began) for name, began, end in events if name == label) / steps for label in BESIDE]
        rows.append((what, rank, steps, sum(milliseconds), *milliseconds, *beside))
    return rows


def write_chrome_trace(path: Path, ranks: Sequence[Sequence[Event]]) -> None:
    origin = min(began for events in ranks for _, began, _ in events)
    trace = [
        {
            "name": label,
            "ph": "X",
            "pid": rank,
            "tid": _lane(label),
            "ts": 1e6 * (began - origin),
            "dur": 1e6 * (ended - began),
        }
        for rank, events in enumerate(ranks)
        for label, began, ended in events
    ]
    names = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"cfg rank {rank}"}}
        for rank in range(len(ranks))
    ]
    path.write_text(json.dumps({"traceEvents": names + trace}))


def _lane(label: str) -> int:
    """0 for what a step consists of, then one for each thread beside it."""
    return BESIDE.index(label) + 1 if label in BESIDE else 0


def plot_timeline(path: Path, ranks: Sequence[Sequence[Event]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    origin = min(began for events in ranks for _, began, _ in events)
    figure, axes = pyplot.subplots(figsize=(16, 1 + 1.2 * len(ranks)), layout="constrained")
    for _, label in HOOKS:  # a step first, its parts over it
        for rank, events in enumerate(ranks):
            bars = [(1e3 * (began - origin), 1e3 * (ended - began)) for name, began, ended in events if name == label]
            low, height = rank - 0.4 + (0.0, 0.52, 0.68)[_lane(label)], (0.5, 0.14, 0.14)[_lane(label)]
            axes.broken_barh(bars, (low, height), color=COLOURS[label], label=None if rank else label)
    axes.set_yticks(range(len(ranks)), [f"cfg rank {rank}" for rank in range(len(ranks))])
    axes.set_xlabel("ms")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=len(HOOKS), frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def traced(llm: DiffusionLLM, warm_up: Sequence[Job], jobs: Sequence[Job]) -> list[list[Event]]:
    """The events of every rank while it ran `jobs`."""
    on_ranks(llm, _install_timers)
    generate(llm, warm_up)
    on_ranks(llm, _take_events)
    generate(llm, jobs)
    return on_ranks(llm, _take_events)


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--model", default="emoji", help="of the mixed batch: emoji, light or mid (default emoji)")
    parser.set_defaults(out=Path("benchmark_results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    on = machine()
    with model_folder(args.model) as folder, engine(folder, 2) as llm:
        mixed = traced(llm, mixed_jobs(True), mixed_jobs(False))
    write_chrome_trace(args.out / "trace.json", mixed)
    plot_timeline(args.out / "timeline.png", mixed)
    rows = profile_rows(f"{args.model}, mixed batch", mixed)
    with model_folder("light") as folder, engine(folder, 2) as llm:
        warm_up, jobs = (equal_jobs(1, 64, 20 if args.quick else 100, True, number) for number in range(2))
        rows += profile_rows("light, 64 px, one guided request", traced(llm, warm_up, jobs))
    report("trace_steps", args.out, on, COLUMNS, rows)


if __name__ == "__main__":
    main()
