"""Traces of mixed requests and what is said of their latencies: pure, every trace follows from its seed.

Must not import the engine, HTTP or asyncio.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.common import Job, percentile

SIDES = (64, 128, 192, 256)  # pixels
STEPS = (4, 8, 12, 20, 30)

Kind = tuple[int, bool]  # side, guided: what the time of one step depends on


@dataclass(frozen=True)
class Arrival:
    """A job and when it comes, in seconds from the start of its trace."""

    at: float
    job: Job


@dataclass(frozen=True)
class Latency:
    """A served job and its seconds from the time it was to arrive until its image was there."""

    job: Job
    seconds: float


@dataclass(frozen=True)
class Summary:
    """Seconds, and the share of requests within their service level objective."""

    p50: float
    p95: float
    p99: float
    guided_p50: float
    guided_p95: float
    guided_p99: float
    slo_share: float


def mixed_jobs(count: int, seed: int) -> list[Job]:
    """Every second one guided, sizes and step counts drawn; no prompt repeats within or between seeds."""
    draw = random.Random(seed)
    return [
        Job(
            prompt=f"a red apple on a blue background, number {seed}-{n}",
            side=draw.choice(SIDES),
            steps=draw.choice(STEPS),
            guided=n % 2 == 0,
            seed=n,
        )
        for n in range(count)
    ]


def one_of_each(steps: int) -> list[Job]:
    """A job of every kind, to warm a system up and to learn how long a step takes when nobody else is there."""
    return [Job(f"a fish, {side} {guided}", side, steps, guided) for side in SIDES for guided in (True, False)]


def poisson(jobs: Sequence[Job], rate: float, seed: int) -> list[Arrival]:
    """The jobs in order, with exponential gaps of `rate` a second."""
    draw, now, arrivals = random.Random(seed), 0.0, []
    for job in jobs:
        now += draw.expovariate(rate)
        arrivals.append(Arrival(now, job))
    return arrivals


def take_batch(waiting: list[Job], most: int) -> list[Job]:
    """Remove the first job and up to `most` - 1 later ones that a list of prompts can take with it."""
    first = waiting[0]
    batch = [job for job in waiting if _shape(job) == _shape(first)][:most]
    for job in batch:
        waiting.remove(job)
    return batch


def _shape(job: Job) -> tuple[int, int, bool]:
    return job.side, job.steps, job.guided


def step_seconds(alone: Sequence[Latency]) -> dict[Kind, float]:
    """Seconds per step of each kind, from jobs that ran alone."""
    return {(latency.job.side, latency.job.guided): latency.seconds / latency.job.steps for latency in alone}


def summarise(latencies: Sequence[Latency], step_s: Mapping[Kind, float], slo: float) -> Summary:
    """Percentiles; the objective of a job is `slo` times what it takes alone."""
    every = [latency.seconds for latency in latencies]
    guided = [latency.seconds for latency in latencies if latency.job.guided]
    within = [
        latency.seconds <= slo * latency.job.steps * step_s[latency.job.side, latency.job.guided]
        for latency in latencies
    ]
    return Summary(
        *(percentile(every, percent) for percent in (50, 95, 99)),
        *(percentile(guided, percent) for percent in (50, 95, 99)),
        slo_share=sum(within) / len(within),
    )
