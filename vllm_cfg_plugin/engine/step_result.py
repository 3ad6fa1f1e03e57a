"""The reports of all ranks on one step, merged into what the scheduler reads. Must not import vLLM or torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_cfg_plugin.engine.plan import DecodedImage, StepReport


@dataclass
class StepResult:
    """One step's outcome.

    Attributes:
        began, denoised: earliest start and latest end over the ranks, `time.monotonic()` of this host.
        encode_ms: request id -> milliseconds of text encoding, of the slowest rank: ranks encode side by side.
        failed: request id -> message, of the first rank that reported it.
        images: decoded images with their pixels.
    """

    began: float = 0.0
    denoised: float = 0.0
    encode_ms: dict[int, float] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    images: list[tuple[DecodedImage, memoryview]] = field(default_factory=list)


def merge_reports(reports: Sequence[tuple[StepReport, Sequence[memoryview]]]) -> StepResult:
    """Merge every rank's report and image frames of the same step, in rank order."""
    result = StepResult(
        began=min((report.began for report, _ in reports), default=0.0),
        denoised=max((report.denoised for report, _ in reports), default=0.0),
    )
    for report, frames in reports:
        for id, milliseconds in report.encoded:
            result.encode_ms[id] = max(result.encode_ms.get(id, 0.0), milliseconds)
        for id, message in report.failed:
            result.failed.setdefault(id, message)
        result.images += zip(report.images, frames, strict=True)
    return result
