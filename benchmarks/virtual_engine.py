"""The engine in virtual time: its real `StepBatch` in EngineCore's loop, which keeps two plans under way.

Times are microseconds; the batch's clock shows seconds. Must not import vLLM.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.virtual_ranks import VirtualRanks
from vllm_cfg_plugin.engine.batching import PlannedStep, StepBatch
from vllm_cfg_plugin.engine.plan import DECODED
from vllm_cfg_plugin.engine.result import RequestMetrics
from vllm_cfg_plugin.engine.step_result import StepResult
from vllm_cfg_plugin.params import DiffusionRequest

# EngineCore keeps so many plans under way, and the executor waits so long for side reports when there is no plan.
PLANS_UNDER_WAY = 2
SIDE_WAIT_US = 2000.0


@dataclass(frozen=True)
class Served:
    """A request whose image is there; seconds of the virtual clock."""

    name: str
    spec: DiffusionRequest
    arrived: float
    finished: float
    metrics: RequestMetrics

    @property
    def latency(self) -> float:
        return self.finished - self.arrived


class VirtualEngine:
    """One engine: EngineCore's `step_with_batch_queue` over a batch and its ranks.

    Args:
        make_batch: the batch that uses this clock.
    """

    def __init__(
        self, make_batch: Callable[[Callable[[], float]], StepBatch], ranks: VirtualRanks, engine_us: float
    ) -> None:
        self.now = 0.0
        self.batch = make_batch(lambda: self.now / 1e6)
        self.ranks = ranks
        self.served: list[Served] = []
        self._engine_us = engine_us
        self._inbox: deque[tuple[float, str, DiffusionRequest]] = deque()
        self._arrivals: dict[str, float] = {}
        self._ends: list[float] = []
        self._under_way: deque[tuple[PlannedStep, StepResult] | None] = deque()  # None: a look for side reports

    def submit(self, at: float, name: str, spec: DiffusionRequest) -> None:
        """A request arrives; to be called in order of time, when the engine has run until then."""
        self._inbox.append((at, name, spec))
        self._arrivals[name] = at

    def outstanding(self, at: float) -> int:
        """Requests that came and are not answered at a time."""
        return len(self._arrivals) - bisect_right(self._ends, at)

    def run_until(self, until: float) -> None:
        """Go on until a time, or until all is done."""
        while self.now < until and self._turn():
            pass

    def _turn(self) -> bool:
        """One turn of the loop; False if there is nothing to do until another request comes."""
        while self._inbox and self._inbox[0][0] <= self.now:
            _, name, spec = self._inbox.popleft()
            self.batch.add(name, 0, spec)
        if len(self.batch):
            self._issue(self.batch.next_plan())
            if len(self._under_way) < PLANS_UNDER_WAY:
                return True
        elif not self._under_way:
            self.now = max(self.now, self._inbox[0][0]) if self._inbox else self.now
            return bool(self._inbox)
        self._collect(self._under_way.popleft())
        return True

    def _issue(self, planned: PlannedStep) -> None:
        if not planned.plan.is_empty():
            self.now += self._engine_us
            self._under_way.append((planned, self.ranks.run(planned.plan, self.now)))
        elif self.batch.awaits_side_work or any(self._under_way):
            self._under_way.append(None)
        else:
            raise RuntimeError(f"{len(self.batch.waiting)} requests wait, but the engine has nothing to do")

    def _collect(self, first: tuple[PlannedStep, StepResult] | None) -> None:
        """Wait for the oldest plan, or a while for side reports if there is none, and note what was done."""
        if first is not None:
            planned, result = first
            self.now = max(self.now, 1e6 * result.denoised)
            self.batch.note_result(planned, result)
        elif not any(self._under_way):
            self.now = max(self.now, min(self.ranks.next_report(), self.now + SIDE_WAIT_US))
        for report in self.ranks.take_reports(self.now):
            request = self.batch.note_side_report(report)
            if request is not None and report.branch == DECODED:
                self.batch.finish(request)
                metrics = request.metrics(self.now / 1e6, report.milliseconds)
                arrived = self._arrivals[request.request_id] / 1e6
                self.served.append(Served(request.request_id, request.spec, arrived, self.now / 1e6, metrics))
                self._ends.append(self.now)
