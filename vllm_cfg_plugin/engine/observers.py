"""What others learn of an engine while it works: clients of their requests, operators of its ranks.

Nothing of it is part of a result. Must not import vLLM or torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from vllm_cfg_plugin.engine.admission import WaitingLine
from vllm_cfg_plugin.engine.batching import PlannedStep
from vllm_cfg_plugin.engine.plan import PREVIEWED
from vllm_cfg_plugin.engine.progress import Preview, Progress, ProgressPublisher, Queued
from vllm_cfg_plugin.engine.request import ScheduledRequest
from vllm_cfg_plugin.engine.stats import StatsCollector
from vllm_cfg_plugin.engine.step_result import SideResult, StepResult
from vllm_cfg_plugin.engine.trace import TraceFile, trace_path

_QUEUE_SECONDS = 1.0
_MOST_QUEUED = 100


class Observers:
    """Progress, previews and places in the line for clients; counts for /metrics; a trace.

    Args:
        engine: number of the engine among replicas.
        progress_address: what clients' addresses begin with; "" where there are none.
        trace: file to write; "" for none.
    """

    def __init__(self, engine: int, ranks: int, progress_address: str, trace: str) -> None:
        self._progress = ProgressPublisher(progress_address) if progress_address else None
        self._stats = StatsCollector(engine, ranks)
        self._trace = TraceFile(trace_path(trace, engine), engine, ranks) if trace else None
        self._queue_told = 0.0  # when clients last heard of it

    def note_plan(self, planned: PlannedStep, waiting: WaitingLine) -> None:
        """A step was planned, while others wait."""
        self._stats.note_step(planned.running)
        self._publish_queue(waiting)

    def note_result(self, planned: PlannedStep, result: StepResult) -> None:
        """All ranks have reported a step."""
        self._stats.note_result(result)
        if self._trace is not None:
            self._trace.note_step(planned.plan.step, planned.running, result)
        self._publish_progress(planned.running)

    def note_side_result(self, side: SideResult, request: ScheduledRequest | None) -> None:
        """A piece of side work is done; the request may be gone."""
        report, pixels = side
        self._stats.note_side_report(report)
        if self._trace is not None:
            self._trace.note_side_report(report, request)
        # A preview that could not be made is none: its request goes on.
        if report.branch == PREVIEWED and request is not None and pixels is not None:
            self._publish_preview(request, report.shape, pixels)

    def note_restart(self) -> None:
        """The ranks were started anew."""
        self._stats.note_restart()

    def tell(self, is_idle: bool) -> None:
        """Publish the counts, to one API server, whose /metrics are those of all."""
        if self._progress is not None and (stats := self._stats.take(is_idle)) is not None:
            self._progress.publish(0, stats)
        if self._trace is not None and is_idle:
            self._trace.flush()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._trace is not None:
            self._trace.close()

    def _publish_progress(self, running: Iterable[ScheduledRequest]) -> None:
        if self._progress is not None:
            for request in running:
                if key := request.spec.progress_key:
                    progress = Progress(key, request.done_steps, request.spec.steps)
                    self._progress.publish(request.client_index, progress)

    def _publish_queue(self, waiting: WaitingLine) -> None:
        """Where the first ones stand in line, once a second: a line may be long, and move with every step."""
        now = time.monotonic()
        if self._progress is None or not waiting or now - self._queue_told < _QUEUE_SECONDS:
            return
        self._queue_told = now
        for ahead, request in enumerate(waiting.in_order()[:_MOST_QUEUED]):
            if key := request.spec.progress_key:
                self._progress.publish(request.client_index, Queued(key, ahead))

    def _publish_preview(self, request: ScheduledRequest, shape: tuple[int, ...], pixels: memoryview) -> None:
        if self._progress is not None:
            preview = Preview(request.spec.progress_key, request.made_previews - 1, shape)
            self._progress.publish(request.client_index, preview, pixels)
