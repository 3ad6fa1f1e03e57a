"""One request inside the scheduler: what is asked, how far it is planned, how far it is done; must not import torch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_cfg_plugin.engine.planner import BranchLoad
from vllm_cfg_plugin.engine.result import RequestMetrics
from vllm_cfg_plugin.params import DiffusionRequest

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreEvent


@dataclass
class ScheduledRequest:
    """Life: waiting -> running (steps are being planned) -> draining (all planned, image not back yet).

    Attributes:
        request_id, client_index: vLLM's names for the request and for who asked.
        id: our integer name for it, used in plans.
        owners: cfg rank of each branch; empty while it waits.
        planned_steps, done_steps: denoising steps in plans sent, and in reports received.
    """

    request_id: str
    client_index: int
    id: int
    spec: DiffusionRequest
    events: list[EngineCoreEvent] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    began: float = 0.0
    denoised: float = 0.0
    encode_ms: float = 0.0
    owners: tuple[int, ...] = ()
    planned_steps: int = 0
    done_steps: int = 0

    @property
    def branch_tokens(self) -> tuple[int, ...]:
        return tuple(self.spec.image_tokens + text for text in self.spec.text_tokens)

    @property
    def load(self) -> BranchLoad:
        return BranchLoad(self.id, self.branch_tokens, self.owners)

    @property
    def fully_planned(self) -> bool:
        return self.planned_steps == self.spec.num_inference_steps

    def metrics(self, decode_ms: float = 0.0) -> RequestMetrics:
        return RequestMetrics(
            queue_ms=1e3 * ((self.admitted or time.monotonic()) - self.arrived),
            encode_ms=self.encode_ms,
            denoise_ms=max(0.0, 1e3 * (self.denoised - self.began) - self.encode_ms),
            decode_ms=decode_ms,
            steps=self.done_steps,
            seed=self.spec.seed,
            guided=self.spec.guided,
            guidance_off=self.spec.guidance_off,
        )
