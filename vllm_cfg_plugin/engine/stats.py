"""What an engine's ranks do, counted for whoever watches the server: what /metrics shows. Pure.

Counts go to an API server as differences, at most once a second and when the engine falls idle. Must not import torch
or vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec

from vllm_cfg_plugin.engine.plan import SideReport
from vllm_cfg_plugin.engine.planner import rank_loads
from vllm_cfg_plugin.engine.request import ScheduledRequest
from vllm_cfg_plugin.engine.step_result import StepResult

_SECONDS = 1.0
# A text that a rank has in its cache takes no longer than this; to encode the shortest takes several times that.
_CACHED_MS = 0.1


class EngineStats(msgspec.Struct, array_like=True, tag=True):
    """What has happened since the last one; lists are by rank.

    Attributes:
        engine: number of the engine among replicas.
        steps: denoising steps of all that step together.
        rows: branches that were forwarded in them.
        predicted_us: microseconds that their forwards were predicted to take, and longest_us: of each step the rank
            that had most.
        step_seconds: from a step's beginning to its end, with what a rank waited for others.
        restarts: of all ranks.
        encoded, cached: texts that ranks encoded, and those that they had.
    """

    engine: int
    rows: list[int]
    predicted_us: list[int]
    step_seconds: list[float]
    steps: int = 0
    longest_us: int = 0
    restarts: int = 0
    encoded: int = 0
    cached: int = 0

    @classmethod
    def none(cls, engine: int, ranks: int) -> EngineStats:
        return cls(engine, [0] * ranks, [0] * ranks, [0.0] * ranks)


class StatsCollector:
    """Counts for one engine; nothing that it does takes longer for more requests while their batch is the same."""

    def __init__(self, engine: int, ranks: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._ranks = ranks
        self._clock = clock
        self._stats = EngineStats.none(engine, ranks)
        self._taken_at = clock()
        self._batch: Mapping[ScheduledRequest, tuple[int, ...]] = {}  # whose rows and loads are known
        self._rows = self._loads = [0] * ranks

    def note_step(self, running: Mapping[ScheduledRequest, tuple[int, ...]]) -> None:
        """A step was planned; of an unchanged batch `running` is the same object.

        Args:
            running: who takes it, with the ranks that forward their branches.
        """
        if not running:
            return
        if running is not self._batch:
            self._batch, nothing = running, [0] * self._ranks
            self._rows, self._loads = nothing, nothing
            for request, owners in running.items():
                self._rows = rank_loads([1] * len(owners), owners, self._ranks, self._rows)
                self._loads = rank_loads(request.costs[: len(owners)], owners, self._ranks, self._loads)
        stats = self._stats
        stats.steps += 1
        stats.longest_us += max(self._loads)
        for rank in range(self._ranks):
            stats.rows[rank] += self._rows[rank]
            stats.predicted_us[rank] += self._loads[rank]

    def note_result(self, result: StepResult) -> None:
        for rank, (began, denoised) in enumerate(result.spans[: self._ranks]):
            self._stats.step_seconds[rank] += denoised - began

    def note_side_report(self, report: SideReport) -> None:
        if report.branch >= 0 and not report.error:
            self._stats.encoded += report.milliseconds > _CACHED_MS
            self._stats.cached += report.milliseconds <= _CACHED_MS

    def note_restart(self) -> None:
        self._stats.restarts += 1

    def take(self, is_idle: bool) -> EngineStats | None:
        """The counts, if it is time for them."""
        now = self._clock()
        if not is_idle and now - self._taken_at < _SECONDS:
            return None
        taken, self._stats, self._taken_at = self._stats, EngineStats.none(self._engine, self._ranks), now
        return taken
