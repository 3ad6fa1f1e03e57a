"""This plugin's Prometheus metrics, in the registry of vLLM's: `/metrics` shows them, of all API servers and engines.

docs/operating.md has a line for each, and `examples/grafana_dashboard.json` shows them. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Histogram

from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.engine.stats import EngineStats
from vllm_cfg_plugin.errors import RequestAbortedError, ServerBusyError

PREFIX = "vllm_cfg:"
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
_STAGES = ("queue", "encode", "denoise", "decode")

# Of engines.
_STEPS = Counter(f"{PREFIX}steps", "Denoising steps, each of all requests that step together.", ["engine"])
_ROWS = Counter(f"{PREFIX}rank_branches", "Branches that a rank forwarded in those steps.", ["engine", "rank"])
_PREDICTED = Counter(
    f"{PREFIX}rank_predicted_seconds", "Seconds that those forwards were predicted to take.", ["engine", "rank"]
)
_LONGEST = Counter(f"{PREFIX}longest_predicted_seconds", "The same of the rank that had most in each step.", ["engine"])
_STEPPING = Counter(
    f"{PREFIX}rank_step_seconds", "Seconds from the begin of steps to their end; a rank idles else.", ["engine", "rank"]
)
_RESTARTS = Counter(f"{PREFIX}rank_restarts", "How often all ranks of an engine were started anew.", ["engine"])
_TEXTS = Counter(f"{PREFIX}texts", "Texts of branches, encoded or in a rank's cache.", ["engine", "source"])
# Of requests; a request of n results counts n times.
_RESULTS = Counter(f"{PREFIX}results", "Images and videos by what became of them.", ["outcome"])
_REFUSED = Counter(f"{PREFIX}refused_requests", "Requests that were answered with an error.", ["status"])
_SECONDS = {
    stage: Histogram(f"{PREFIX}{stage}_seconds", f"Seconds of a result's {stage}.", buckets=_BUCKETS)
    for stage in _STAGES
}
_REAL = Counter(f"{PREFIX}work_seconds", "Seconds that finished results took, without their time in the queue.")
_EXPECTED = Counter(f"{PREFIX}expected_work_seconds", "What they were predicted to take on an engine of their own.")
_BRANCH_STEPS = Counter(
    f"{PREFIX}branch_steps", "Steps of finished results' branches, computed or reused by caches of steps.", ["source"]
)
_PREVIEWS = Counter(f"{PREFIX}previews", "Previews that were made for streams.")


def note_engine(stats: EngineStats) -> None:
    """Add what an engine has counted."""
    engine = str(stats.engine)
    _STEPS.labels(engine).inc(stats.steps)
    _LONGEST.labels(engine).inc(stats.longest_us / 1e6)
    _RESTARTS.labels(engine).inc(stats.restarts)
    _TEXTS.labels(engine, "encoded").inc(stats.encoded)
    _TEXTS.labels(engine, "cached").inc(stats.cached)
    for rank, rows in enumerate(stats.rows):
        labels = engine, str(rank)
        _ROWS.labels(*labels).inc(rows)
        _PREDICTED.labels(*labels).inc(stats.predicted_us[rank] / 1e6)
        _STEPPING.labels(*labels).inc(stats.step_seconds[rank])


def note_preview() -> None:
    _PREVIEWS.inc()


def note_refusal(status: int) -> None:
    _REFUSED.labels(str(status)).inc()


def note_done(metrics: RequestMetrics, expected_seconds: float | None) -> None:
    """A result is there; `expected_seconds` None: nobody knew."""
    _RESULTS.labels("done").inc()
    seconds = {stage: getattr(metrics, f"{stage}_ms") / 1e3 for stage in _STAGES}
    for stage, taken in seconds.items():
        _SECONDS[stage].observe(taken)
    _BRANCH_STEPS.labels("computed").inc(sum(metrics.computed_steps))
    _BRANCH_STEPS.labels("reused").inc(sum(metrics.reused_steps))
    if expected_seconds is not None:
        _REAL.inc(sum(seconds.values()) - seconds["queue"])
        _EXPECTED.inc(expected_seconds)


@contextmanager
def counted_failures() -> Iterator[None]:
    """Count the end of a result that is not done within the block."""
    try:
        yield
    except asyncio.CancelledError:
        _RESULTS.labels("cancelled").inc()
        raise
    except RequestAbortedError:
        _RESULTS.labels("aborted").inc()
        raise
    except ServerBusyError:  # it never was one
        raise
    except Exception:
        _RESULTS.labels("failed").inc()
        raise
