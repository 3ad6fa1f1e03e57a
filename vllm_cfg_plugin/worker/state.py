"""What a rank remembers of one request.

All ranks hold the same latents and noise-scheduler state of every request. Only ranks that were told to encode one of
its branches hold that one's embeddings, and what its images became. Must not import vLLM or torch.distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.adapters import Carried
from vllm_cfg_plugin.pipelines.base import PromptEmbeds
from vllm_cfg_plugin.pipelines.common.step_cache import History
from vllm_cfg_plugin.worker.unsettled import ExchangedFlags


@dataclass
class RequestState:
    """One request on this rank.

    Attributes:
        latents: [1, ...].
        noise_scheduler: diffusers' noise scheduler of this request alone, its timesteps set.
        generator: draws its first latents, then the noise of steps that draw some; alike on all ranks.
        prediction_shape: of one branch's prediction, without its leading 1.
        prompt_embeds: of the branches this rank was told to encode.
        condition: what the request's images became, on ranks that encoded a branch.
        owners: cfg rank that forwards each branch, those of this step only; empty until it runs, and where its cache
            stands in for all of them.
        predictions: of a long request's next step, those of the branches that this rank forwarded.
        index: timesteps taken.
        history: of its cache of steps, alike on all ranks; empty without one.
        preparation: of its latents and its noise scheduler; None when the steps have them.
        last_flags: of the last step that it took.
        carried: its adapters, on ranks that hold a text of it.
        error: why it can't go on here; '' while it can. The other ranks learn of it in the next exchange.
    """

    id: int
    request: DiffusionRequest
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    noise_scheduler: Any = None
    generator: torch.Generator | None = None
    prediction_shape: tuple[int, ...] = ()
    prompt_embeds: dict[int, PromptEmbeds] = field(default_factory=dict)
    condition: Sequence[torch.Tensor] = ()
    owners: tuple[int, ...] = ()
    predictions: dict[int, torch.Tensor] = field(default_factory=dict)
    index: int = 0
    history: History = field(default_factory=dict)
    preparation: Future[None] | None = None
    last_flags: ExchangedFlags | None = None
    carried: Carried = ()
    error: str = ""

    @property
    def is_denoised(self) -> bool:
        return self.index == self.request.steps
