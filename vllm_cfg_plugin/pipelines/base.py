"""What the engine asks of a model family: the contract between the worker's step loop and a pipeline.

Must not import vLLM; diffusers is the business of the families.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from vllm_cfg_plugin.distributed.cfg_parallel import CFGParallelMixin
from vllm_cfg_plugin.params import DiffusionRequest


@dataclass(frozen=True)
class BranchInput:
    """One branch forward of one request in one step.

    Attributes:
        latents: [1, image_tokens, channels].
        prompt_embeds: [text_tokens, dim].
        timestep: a scalar, one element of the noise scheduler's `timesteps`.
        height, width: pixels of the image.
        timesteps_ahead: those of the following steps, [any number], a view of the same `timesteps`: what depends on a
            timestep alone may be computed ahead and remembered, as weights do not change; None forbids that. Both may
            stay on the CPU, which spares a GPU's queue from being waited for.
    """

    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    timestep: torch.Tensor
    height: int
    width: int
    timesteps_ahead: torch.Tensor | None = None


class EnginePipeline(CFGParallelMixin, ABC):
    """A pipeline that the engine can run: many requests' branches in one forward, everything else request by request.

    The engine makes one `predict_noise(**pack_branches(...))` call a step, then, request by request,
    `combine_cfg_noise` and `scheduler_step`: the mixin's hooks, so an override of any of them acts in the engine as
    in `diffuse()`.

    Attributes:
        cfg_normalize: what the engine passes to `combine_cfg_noise`.
        scheduler: the noise scheduler; the engine puts a request's own one here around `scheduler_step`.
    """

    cfg_normalize: ClassVar[bool]

    @classmethod
    @abstractmethod
    def load(cls, model: str, *, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> Self:
        """Load a checkpoint for inference.

        Args:
            model: folder or hub repository id.
            dtype: of weights and computation.

        Raises:
            ConfigurationError: the checkpoint can't be loaded or asks for something the packed forward lacks.
        """

    @abstractmethod
    def encode_branch(self, prompt: str) -> torch.Tensor:
        """Embeddings of one prompt, [text_tokens, dim]; bitwise the same at every call."""

    @abstractmethod
    def draw_noise(self, request: DiffusionRequest) -> torch.Tensor:
        """First latents, [1, image_tokens, channels], from a CPU generator of the request's own seed."""

    @abstractmethod
    def make_noise_scheduler(self, request: DiffusionRequest) -> Any:
        """A noise scheduler of the request's own, its timesteps set and at its first step."""

    @abstractmethod
    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        """The arguments of the one `predict_noise` call that forwards all branches."""

    @abstractmethod
    def unpack_predictions(self, prediction: torch.Tensor, branches: Sequence[BranchInput]) -> list[torch.Tensor]:
        """What `predict_noise` returned, branch by branch, each [1, image_tokens, channels]."""

    @abstractmethod
    def decode(self, latents: torch.Tensor, request: DiffusionRequest) -> torch.Tensor:
        """The image of final latents [1, image_tokens, channels]: uint8 [height, width, 3] on the CPU."""

    def forget_derived(self) -> None:
        """Forget what was computed from the weights alone, because they have changed; a family that keeps any does."""

    @abstractmethod
    def exchange_shape(self, request: DiffusionRequest) -> tuple[int, int]:
        """(image_tokens, channels) of one prediction, known without computing it."""
