"""What a rank has queued on its device and is not done there; must not import vLLM or torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_cfg_plugin.engine.plan import StepReport
from vllm_cfg_plugin.worker.pace import Mark


@dataclass(frozen=True)
class ExchangedFlags:
    """Which requests of a step have failed on some rank.

    Attributes:
        ids: of the requests.
        flags: bool [requests], on the CPU, to be read once `arrived` is reached.
    """

    ids: list[int]
    flags: torch.Tensor
    arrived: Mark

    def all_failed(self) -> list[int]:
        """The requests that have failed; waits for the flags."""
        self.arrived.wait()
        return [id for id, has_failed in zip(self.ids, self.flags.tolist(), strict=True) if has_failed]

    def failed(self, id: int) -> bool:
        return id in self.all_failed()


@dataclass(frozen=True)
class UnsettledPlan:
    """A plan that was carried out as far as the host is concerned.

    Attributes:
        began, denoised: where its steps begin and end in the device's queue.
        failures: (request id, message) of requests that can't go on.
    """

    step: int
    began: Mark
    denoised: Mark
    failures: list[tuple[int, str]]

    def report(self, rank: int) -> StepReport:
        """The report; waits for the steps to end."""
        self.denoised.wait()
        return StepReport(self.step, rank, self.began.seconds(), self.denoised.seconds(), self.failures)
