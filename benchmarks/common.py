"""What all benchmarks share: models, jobs, engines with pinned ranks, interleaved rounds, and how results are written.

It reaches the engine only through its public names and `on_ranks`. Must not import the engine's inner modules: a
benchmark that needs them says so in its own docstring.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers

from tests.model_builders.qwen_image import build_qwen_image
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

EMOJI = Path(__file__).parents[1] / "examples/models/emoji"
CORES = sorted(os.sched_getaffinity(0))
SCALE = 4.0
NEGATIVE = " "

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One image that somebody asks for."""

    prompt: str
    side: int
    steps: int
    guided: bool
    seed: int = 0

    def params(self) -> DiffusionParams:
        return DiffusionParams(
            height=self.side,
            width=self.side,
            num_inference_steps=self.steps,
            true_cfg_scale=SCALE if self.guided else 1.0,
            negative_prompt=NEGATIVE if self.guided else None,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Timing:
    """One call: seconds of the whole, and milliseconds of the (slowest) denoising loop."""

    seconds: float
    denoise_ms: float


def equal_jobs(count: int, side: int, steps: int, guided: bool, round_number: int) -> list[Job]:
    """Jobs that agree in all but prompt and seed; no round repeats another's prompts, whose embeddings are cached."""
    things = ("rocket", "grinning face", "sunflower", "red apple", "fish", "panda")
    prompts = [f"a {things[n % len(things)]} on a black background, number {round_number}-{n}" for n in range(count)]
    return [Job(prompt, side, steps, guided, seed) for seed, prompt in enumerate(prompts)]


@contextmanager
def model_folder(name: str) -> Iterator[str]:
    """The folder of a model: "emoji" is the bundled one, else a size of `build_qwen_image`, built for the while."""
    if name == "emoji":
        yield str(EMOJI)
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-model-") as folder:
        yield str(build_qwen_image(Path(folder) / name, size=name))


def pin_process(cores: Sequence[int]) -> None:
    """Bind all threads of this process, also those that its libraries started, to these cores."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def on_ranks(llm: DiffusionLLM, function: Callable[..., T], *args: Any) -> list[T]:
    """`function(worker, *args)` on every rank of an engine; the results by rank."""
    return llm._engine.collective_rpc(function, args=args)


def _pin_rank(worker: Any, cores: Sequence[int]) -> None:
    pin_process([cores[worker.rank % len(cores)]])


@contextmanager
def engine(model: str, ranks: int, **engine_args: Any) -> Iterator[DiffusionLLM]:
    """An engine whose rank r is bound to core r."""
    with DiffusionLLM(model, cfg_parallel_size=ranks, **engine_args) as llm:
        on_ranks(llm, _pin_rank, CORES)
        yield llm


def generate(llm: DiffusionLLM, jobs: Sequence[Job]) -> Timing:
    """All jobs at once.

    Raises:
        RuntimeError: one of them failed.
    """
    began = time.perf_counter()
    outputs = llm.generate([job.prompt for job in jobs], [job.params() for job in jobs], use_tqdm=False)
    seconds = time.perf_counter() - began
    if errors := [output.error for output in outputs if output.error]:
        raise RuntimeError(errors[0])
    return Timing(seconds, max(output.metrics.denoise_ms for output in outputs))


def interleave(contestants: Mapping[str, Callable[[int], T]], rounds: int) -> dict[str, list[T]]:
    """What each contestant's call with the round's number returned; round 0 warms up and is dropped.

    The contestants take turns within a round, so that a busy machine disturbs them alike.
    """
    taken: dict[str, list[T]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            result = run(number)
            if number:
                taken[name].append(result)
    return taken


def median_timing(timings: Sequence[Timing]) -> Timing:
    return Timing(statistics.median(t.seconds for t in timings), statistics.median(t.denoise_ms for t in timings))


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest of the sorted values; NaN of none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def machine() -> str:
    """One line about this machine, for the head of every result."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.processor()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{name}, {len(CORES)} cores, torch {torch.__version__}, load before the run {load}"


def start(doc: str | None) -> argparse.ArgumentParser:
    """Prepare this process; returns a parser with what every benchmark takes."""
    # Told to stop, end what was started and remove what was written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # vLLM hands a function to the ranks only with this; the values that come back are plain.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    # Only the results are to be read.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # Also before a fork: a child of a process whose thread pool has run can't use its own.
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short version, to see that it works")
    parser.add_argument("--rounds", type=int, help="measured rounds; the default depends on --quick")
    parser.add_argument("--out", type=Path, help="folder for the results as JSON, and for plots where there are any")
    return parser


def report(name: str, out: Path | None, on: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table and, with `out`, save it there as <name>.json; `on` is the machine's line."""
    print(f"{name}: {on}\n\n{markdown_table(columns, rows)}\n", flush=True)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        records = [dict(zip(columns, row, strict=True)) for row in rows]
        (out / f"{name}.json").write_text(json.dumps({"machine": on, "rows": records}, indent=1))
