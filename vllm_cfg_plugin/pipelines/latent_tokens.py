"""What the engine's pipelines of Flux and LongCat-Image have in common; must not import vLLM.

Two latent pixels each way make one token, an AutoencoderKL decodes, and position ids tell tokens apart.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline, to_uint8
from vllm_cfg_plugin.pipelines.flow_schedule import set_flow_timesteps
from vllm_cfg_plugin.worker.packing import LayoutCache


class LatentTokensPipeline(EnginePipeline):
    """Goes before diffusers' pipeline class among the bases."""

    vae: Any
    vae_scale_factor: int
    image_processor: Any
    _ids: LayoutCache

    def draw_noise(self, request: DiffusionRequest) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(request.seed)
        return self._prepare_noise(1, request.height, request.width, self._weight, generator)

    def make_noise_scheduler(self, request: DiffusionRequest) -> Any:
        # Its numbers stay on the CPU: reading one from a GPU would wait for all that is queued there.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        set_flow_timesteps(scheduler, request.num_inference_steps, request.image_tokens, torch.device("cpu"))
        return scheduler

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        dtype = branches[0].latents.dtype
        return {
            "hidden_states": torch.cat([part for own in branches for part in (own.latents, *own.condition)], dim=1),
            "timestep": torch.stack([own.timestep for own in branches]).to(dtype) / 1000,
            "encoder_hidden_states": torch.cat([own.embeds.tokens for own in branches])[None],
            "img_ids": [self._image_ids(own) for own in branches],
            "txt_ids": [self._text_ids(own.embeds.tokens.shape[0]) for own in branches],
        }

    def unpack_predictions(self, prediction: torch.Tensor, branches: Sequence[BranchInput]) -> list[torch.Tensor]:
        lengths = [sum(part.shape[1] for part in (own.latents, *own.condition)) for own in branches]
        sequences = prediction.split(lengths, dim=1)
        return [sequence[:, : own.latents.shape[1]] for sequence, own in zip(sequences, branches, strict=True)]

    def prediction_shape(self, request: DiffusionRequest) -> tuple[int, ...]:
        return request.image_tokens, self.transformer.config.in_channels

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, request: DiffusionRequest, condition: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        image = self._decode_latents(latents, request.height, request.width)
        return to_uint8(self.image_processor.postprocess(image, output_type="np"))

    # ---- for the families ----

    @abstractmethod
    def _prepare_noise(
        self,
        count: int,
        height: int,
        width: int,
        like: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """First latents, [count, image tokens, channels], of the dtype and on the device of `like`."""

    @abstractmethod
    def _image_ids(self, branch: BranchInput) -> torch.Tensor:
        """Position ids of a branch's image tokens, and then of its condition's, [tokens, 3]; see `_kept_ids`."""

    @abstractmethod
    def _text_ids(self, tokens: int) -> torch.Tensor:
        """Position ids of a text, [tokens, 3]; see `_kept_ids`."""

    # ---- helpers ----

    @property
    def _weight(self) -> torch.Tensor:
        """Any weight, for its device and dtype: diffusers' own properties search all modules for milliseconds."""
        weight: torch.Tensor = self.transformer.x_embedder.weight
        return weight

    def _kept_ids(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The same tensor of position ids every time: by that the transformer finds its layout again."""
        ids: torch.Tensor = self._ids.get_or_make(key, lambda: make().to(self._weight.device))
        return ids

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image in tokens."""
        side = 2 * self.vae_scale_factor
        return height // side, width // side

    def _decode_latents(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[batch, 3, height, width] in -1..1; the end of diffusers' `__call__`, which is no method of its own there."""
        pipeline: Any = self
        return decode_latents(self.vae, pipeline._unpack_latents(latents, height, width, self.vae_scale_factor))


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """[batch, 3, height, width] in -1..1 by an AutoencoderKL from latents [batch, channels, height, width]."""
    scaled = (latents / vae.config.scaling_factor) + vae.config.shift_factor
    image: torch.Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    return image


def vae_scale_factor(checkpoint: Checkpoint) -> int:
    """Pixels each way that one latent pixel of a checkpoint's AutoencoderKL stands for."""
    scale: int = 2 ** (len(checkpoint.component_config("vae")["block_out_channels"]) - 1)
    return scale
