"""What each rank did and when, as a file that Perfetto shows: `--cfg-trace FILE`, a lane a rank. Must not import torch.

Chrome's trace format (https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU): an array of
events, whose end may be missing, so that a killed engine leaves a file that can be read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_cfg_plugin.engine.plan import DECODED, FORWARDED, KEPT, PREVIEWED, SideReport
from vllm_cfg_plugin.engine.request import ScheduledRequest
from vllm_cfg_plugin.engine.step_result import StepResult

_SIDE_NAMES = {DECODED: "decode", FORWARDED: "long forward", KEPT: "keep", PREVIEWED: "preview"}
_MOST_BYTES = 2**30


def trace_path(path: str, engine: int) -> Path:
    """Where an engine writes: the first one to `trace.json`, the next ones to `trace.1.json`, ..."""
    asked = Path(path)
    return asked.with_suffix(f".{engine}{asked.suffix}") if engine else asked


class TraceFile:
    """Writes the trace of one engine.

    Args:
        path: of the file; what was there is replaced.
        engine: number of the engine among replicas, a process of its own in the trace.

    Raises:
        OSError: it can't be written.
    """

    def __init__(self, path: Path, engine: int, ranks: int) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=2**16)
        self._engine = engine
        self._file.write("[\n")
        self._write({"ph": "M", "name": "process_name", "args": {"name": f"engine {engine}"}})
        for rank in range(ranks):
            self._write({"ph": "M", "name": "thread_name", "tid": 2 * rank, "args": {"name": f"rank {rank}"}})
            beside = {"name": f"rank {rank}, beside the steps"}
            self._write({"ph": "M", "name": "thread_name", "tid": 2 * rank + 1, "args": beside})

    def note_step(self, number: int, running: Mapping[ScheduledRequest, tuple[int, ...]], result: StepResult) -> None:
        """A step, on the lane of each rank; `running`: who took it, with the ranks that forwarded their branches."""
        if not running:
            return
        requests = [(request.request_id, owners) for request, owners in running.items()]
        for rank, (began, denoised) in enumerate(result.spans):
            rows = {id: [branch for branch, owner in enumerate(owners) if owner == rank] for id, owners in requests}
            branches = sum(map(len, rows.values()))
            args = {"requests": {id: mine for id, mine in rows.items() if mine}}
            self._span(f"step {number}: {branches} branches", 2 * rank, began, denoised, args)

    def note_side_report(self, report: SideReport, request: ScheduledRequest | None) -> None:
        """A piece of side work, on the lane beside its rank's; it has ended just now."""
        name = _SIDE_NAMES.get(report.branch, f"encode branch {report.branch}")
        ended = time.monotonic()
        args = {"request": "" if request is None else request.request_id}
        self._span(name, 2 * report.rank + 1, ended - report.milliseconds / 1e3, ended, args)

    def _span(self, name: str, lane: int, began: float, ended: float, args: dict[str, Any]) -> None:
        self._write(
            {"ph": "X", "name": name, "tid": lane, "ts": 1e6 * began, "dur": 1e6 * (ended - began), "args": args}
        )

    def _write(self, event: dict[str, Any]) -> None:
        if not self._file.closed:
            self._file.write(json.dumps({"pid": self._engine, **event}) + ",\n")
            if self._file.tell() > _MOST_BYTES:
                self.close()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        self._file.close()
