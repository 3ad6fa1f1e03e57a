"""The step loop alone, without a scheduler: requests join, all take steps, and their latents are looked at."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch

from vllm_cfg_plugin.engine.plan import Admission, Assign, Encode, SideReport, StepPlan
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import EnginePipeline
from vllm_cfg_plugin.worker.exchange import AllGather
from vllm_cfg_plugin.worker.pace import pace_of
from vllm_cfg_plugin.worker.runner import StepRunner
from vllm_cfg_plugin.worker.side_work import SideWork

_ENCODE_SECONDS = 300


class Loop:
    """The steps of one rank.

    Args:
        rank, ranks: of the cfg group; branch b of every request is rank b % ranks's.
    """

    def __init__(
        self,
        pipeline: EnginePipeline,
        rank: int = 0,
        ranks: int = 1,
        all_gather: AllGather = lambda row: row.unsqueeze(0),
    ) -> None:
        self.device = pipeline.prediction_like.device
        self._ranks = ranks
        self._rank = rank
        self._reports: queue.SimpleQueue[SideReport] = queue.SimpleQueue()
        self._side = SideWork(rank, self.device)
        self._side.deliver = lambda report, _: self._reports.put(report)
        self._runner = StepRunner(pipeline, rank, ranks, all_gather, self._side, pace_of(self.device))
        self._steps = count()
        self._ids = count()

    def admit(self, requests: Sequence[DiffusionRequest]) -> list[int]:
        """Have requests encoded and take part in the steps from now on; returns their ids."""
        ids = [next(self._ids) for _ in requests]
        owners = [tuple(branch % self._ranks for branch in range(len(request.prompts))) for request in requests]
        encodes = [
            Encode(id, branch, rank) for id, own in zip(ids, owners, strict=True) for branch, rank in enumerate(own)
        ]
        self._run(admit=[Admission(*pair) for pair in zip(ids, requests, strict=True)], encodes=encodes)
        for _ in range(sum(encode.rank == self._rank for encode in encodes)):
            report = self._reports.get(timeout=_ENCODE_SECONDS)
            if report.error:
                raise RuntimeError(report.error)
        self._run(assign=[Assign(*pair) for pair in zip(ids, owners, strict=True)])
        return ids

    def step(self) -> None:
        """One step of all requests; a GPU may still be at it afterwards."""
        self._runner.start(self._plan(advance=True))
        self._runner.finished()

    def latents(self, id: int) -> torch.Tensor:
        return self._runner.states[id].latents

    def finish(self, requests: Sequence[DiffusionRequest]) -> list[torch.Tensor]:
        """All steps of some requests together; returns their final latents."""
        ids = self.admit(requests)
        for _ in range(max(request.steps for request in requests)):
            self.step()
        self._runner.finished(wait=True)
        found = [self.latents(id).clone() for id in ids]
        self.forget(ids)
        return found

    def forget(self, ids: Sequence[int]) -> None:
        self._run(retire=[*ids])

    def close(self) -> None:
        self._runner.finished(wait=True)
        self._side.close()

    def _run(self, **changes: Any) -> None:
        report = self._runner.run(self._plan(**changes))
        if report.failed:
            raise RuntimeError(report.failed[0][1])

    def _plan(self, advance: bool = False, **changes: Any) -> StepPlan:
        lists: dict[str, Any] = {name: [] for name in ("retire", "admit", "encodes", "assign", "decodes")} | changes
        return StepPlan(step=next(self._steps), advance=advance, **lists)


def finish(pipeline: EnginePipeline, requests: Sequence[DiffusionRequest]) -> list[torch.Tensor]:
    """The final latents of requests that take their steps together."""
    loop = Loop(pipeline)
    try:
        return loop.finish(requests)
    finally:
        loop.close()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
