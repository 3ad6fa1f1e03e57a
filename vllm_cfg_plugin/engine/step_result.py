"""The reports of all ranks on one step, merged into what the scheduler reads. Must not import vLLM or torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_cfg_plugin.engine.plan import SideReport, StepReport

# A side report and, if it brings an image, its pixels.
SideResult = tuple[SideReport, memoryview | None]


@dataclass
class StepResult:
    """One step's outcome.

    Attributes:
        began, denoised: earliest start and latest end over the ranks, `time.monotonic()` of this host.
        failed: request id -> message, of the first rank that reported it.
        side: encodes and decodes that were done meanwhile.
        epoch: number of the ranks' start; those of another epoch than the plan's know nothing of its requests.
        spans: of each rank, when its step began and when its latents were stepped.
        was_lost: the ranks had the plan and were started anew before they had carried it out.
    """

    began: float = 0.0
    denoised: float = 0.0
    failed: dict[int, str] = field(default_factory=dict)
    side: list[SideResult] = field(default_factory=list)
    epoch: int = 0
    spans: list[tuple[float, float]] = field(default_factory=list)
    was_lost: bool = False


def merge_reports(reports: Sequence[StepReport], epoch: int, side: list[SideResult]) -> StepResult:
    """Merge the reports of the same step in rank order: one of every rank, or of every process that a rank is."""
    spans: dict[int, tuple[float, float]] = {}
    for report in reports:
        began, denoised = spans.get(report.rank, (report.began, report.denoised))
        spans[report.rank] = min(began, report.began), max(denoised, report.denoised)
    result = StepResult(
        began=min(report.began for report in reports),
        denoised=max(report.denoised for report in reports),
        side=side,
        epoch=epoch,
        spans=[*spans.values()],
    )
    for report in reports:
        for id, message in report.failed:
            result.failed.setdefault(id, message)
    return result
