"""The simulator against the real thing: the same traces on a real two-rank engine and in virtual time, side by side.

Requests reach the real engine at their times through vLLM's `LLMEngine`, as `DiffusionLLM` would send them; latency is
from the time a request was to come until its image is in this process. The simulator gets the same engine's
calibration. It knows of no other load: "waited" is the share of the time that the real ranks' stepping threads were
ready to run and had no core; where that is more than a few percent the comparison says little. Linux only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import msgspec

from benchmarks.common import EMOJI, engine, percentile
from benchmarks.contestants import SCALE, SIDES, STEPS, Arrival, Contestant, Machine, arrivals, serve, work_us
from benchmarks.virtual_ranks import Overheads
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams
from vllm_cfg_plugin.engine.calibration import Calibration, slowest
from vllm_cfg_plugin.entrypoints.front_end import pooling_params
from vllm_cfg_plugin.model import PLACEHOLDER_PROMPT
from vllm_cfg_plugin.params import DiffusionRequest

RANKS = 2
REQUESTS = 40
PAUSE_US = 1e9  # in virtual time, between the warm-up and the trace


@dataclass(frozen=True)
class Outcome:
    """Images per second until the last image, latencies in seconds, and the share of the time without a core."""

    images_s: float
    p50: float
    p95: float
    waited: float

    @classmethod
    def of(cls, latencies: Sequence[float], seconds: float, waited: float = 0.0) -> Outcome:
        return cls(len(latencies) / seconds, percentile(latencies, 50), percentile(latencies, 95), waited)


def calibrate_bundled_model() -> Calibration:
    """What start-up measures on this machine, or an earlier start did."""
    with engine(str(EMOJI), RANKS) as llm:
        return _calibration(llm)


def _calibration(llm: DiffusionLLM) -> Calibration:
    return slowest([msgspec.convert(answer, Calibration) for answer in llm._engine.collective_rpc("calibrate")])


def validate(args: argparse.Namespace) -> None:
    """Print what both say of two traces: all requests at once, and Poisson arrivals."""
    overheads = Overheads(args.exchange_us, args.request_us, args.admit_us, args.engine_us)
    with engine(str(EMOJI), RANKS) as llm:
        calibration = _calibration(llm)
        print(msgspec.json.encode(calibration).decode())
        limits = llm._engine.vllm_config.scheduler_config
        machine = Machine(RANKS, calibration.cost, overheads, limits.max_num_seqs // RANKS, calibration.token_budget)
        warm_up = [_resolve(llm, f"a fish, {side}", side, 4, True) for side in SIDES]
        _replay(llm, [Arrival(0.0, spec) for spec in warm_up])
        print("| trace | | images/s | p50, s | p95, s | waited |\n|---|---|---|---|---|---|")
        for number, load in product(range(args.rounds or 1), (0.0, 0.6)):
            specs = _mixed(llm, REQUESTS, f"{args.seed}, round {number}, load {load:g}")
            mean_us = statistics.fmean(work_us(spec, machine.cost) for spec in specs)
            trace = arrivals(specs, load * RANKS * 1e6 / mean_us, 1, args.seed) if load else _at_once(specs)
            real = _replay(llm, trace)
            virtual = _simulate(machine, warm_up, trace)
            _print_rows(f"Poisson, load {load:g}" if load else "all at once", real, virtual)


def _print_rows(trace: str, real: Outcome, virtual: Outcome) -> None:
    print(f"| {trace} | real | {real.images_s:.3f} | {real.p50:.3f} | {real.p95:.3f} | {real.waited:.0%} |")
    print(f"| {trace} | simulated | {virtual.images_s:.3f} | {virtual.p50:.3f} | {virtual.p95:.3f} | |")
    ratios = (virtual.images_s / real.images_s, virtual.p50 / real.p50, virtual.p95 / real.p95)
    print(f"| {trace} | ratio | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} | |", flush=True)


def _mixed(llm: DiffusionLLM, count: int, name: str) -> list[DiffusionRequest]:
    """Every size and number of steps in turn, every second one guided; no prompt is used twice."""
    return [
        _resolve(llm, f"a red apple, number {n} of {name}", SIDES[n * 7 % 4], STEPS[n * 3 % 5], n // 2 % 2 == 0)
        for n in range(count)
    ]


def _resolve(llm: DiffusionLLM, prompt: str, side: int, steps: int, guided: bool) -> DiffusionRequest:
    negative = " " if guided else None
    scale = SCALE if guided else 1.0
    params = DiffusionParams(
        height=side, width=side, num_inference_steps=steps, true_cfg_scale=scale, negative_prompt=negative, seed=0
    )
    return llm._front_end.resolve(prompt, params)[0]


def _at_once(specs: Sequence[DiffusionRequest]) -> list[Arrival]:
    return [Arrival(0.0, spec) for spec in specs]


def _replay(llm: DiffusionLLM, trace: Sequence[Arrival]) -> Outcome:
    """Send each request at its time, from a thread, and receive the images."""
    waited = _seconds_without_core()
    began = time.perf_counter()
    due = {f"{began}-{n}": began + arrival.at / 1e6 for n, arrival in enumerate(trace)}

    def send() -> None:
        for (name, at), arrival in zip(due.items(), trace, strict=True):
            time.sleep(max(0.0, at - time.perf_counter()))
            llm._engine.add_request(name, PLACEHOLDER_PROMPT, pooling_params(arrival.spec))

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    latencies: dict[str, float] = {}
    while len(latencies) < len(due):
        for output in llm._engine.step():
            if output.finished:
                latencies[output.request_id] = time.perf_counter() - due[output.request_id]
    sender.join()
    seconds = time.perf_counter() - began
    return Outcome.of(list(latencies.values()), seconds, (_seconds_without_core() - waited) / RANKS / seconds)


def _seconds_without_core() -> float:
    """How long the main threads of all ranks, which are children of the engine, a child of ours, waited for a core."""
    ranks = [rank for core in _children(os.getpid()) for rank in _children(core)]
    return sum(int(Path(f"/proc/{rank}/schedstat").read_text().split()[1]) for rank in ranks) / 1e9


def _children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for children in lists for child in children.read_text().split()]


def _simulate(machine: Machine, warm_up: Sequence[DiffusionRequest], trace: Sequence[Arrival]) -> Outcome:
    later = [Arrival(PAUSE_US + arrival.at, arrival.spec) for arrival in trace]
    served = serve(Contestant("ours", 0), machine, [*_at_once(warm_up), *later])
    counted = [one for one in served if one.arrived >= PAUSE_US / 1e6]
    return Outcome.of([one.latency for one in counted], max(one.finished for one in counted) - PAUSE_US / 1e6)
