"""What the pipelines have in common whose latents are tokens, of two latent pixels each way; must not import vLLM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any

import torch

from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import BranchInput, joint_timesteps_ahead
from vllm_cfg_plugin.pipelines.common.autoencoders import decode_scaled
from vllm_cfg_plugin.pipelines.common.image_pipeline import ImagePipeline
from vllm_cfg_plugin.pipelines.common.packing import LayoutCache
from vllm_cfg_plugin.pipelines.common.upload import upload


class LatentTokensPipeline(ImagePipeline):
    """Latents are [1, tokens, channels], and each image's that is a condition follow them in the sequence."""

    _unpack_latents: Any

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        return {
            "hidden_states": torch.cat([part for own in branches for part in (own.latents, *own.condition)], dim=1),
            "timestep": torch.stack([own.timestep for own in branches]).to(branches[0].latents.dtype) / 1000,
            "encoder_hidden_states": torch.cat([own.embeds.tokens for own in branches])[None],
        }

    def unpack_predictions(self, prediction: torch.Tensor, branches: Sequence[BranchInput]) -> list[torch.Tensor]:
        lengths = [sum(part.shape[1] for part in (own.latents, *own.condition)) for own in branches]
        sequences = prediction.split(lengths, dim=1)
        return [sequence[:, : own.latents.shape[1]] for sequence, own in zip(sequences, branches, strict=True)]

    def prediction_shape(self, request: DiffusionRequest) -> tuple[int, ...]:
        return request.image_tokens, self.transformer.config.in_channels

    @property
    def _latent_channels(self) -> int:
        channels: int = self.transformer.config.in_channels // 4
        return channels

    def _times_ahead(self, branches: Sequence[BranchInput]) -> torch.Tensor | None:
        """The `timesteps_ahead` of a transformer that is modulated by the timestep alone."""
        ahead = joint_timesteps_ahead(branches)
        return None if ahead is None else ahead.to(branches[0].latents.dtype) / 1000

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        side = 2 * self.vae_scale_factor
        return height // side, width // side


class PositionIdsPipeline(LatentTokensPipeline):
    """Flux and LongCat-Image: position ids tell tokens apart, and an AutoencoderKL decodes."""

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        return super().pack_branches(branches) | {
            "img_ids": [self._image_ids(own) for own in branches],
            "txt_ids": [self._text_ids(own.embeds.tokens.shape[0]) for own in branches],
        }

    @abstractmethod
    def _image_ids(self, branch: BranchInput) -> torch.Tensor:
        """Position ids of a branch's image tokens, and then of its condition's, [tokens, 3]; see `_kept_ids`."""

    @abstractmethod
    def _text_ids(self, tokens: int) -> torch.Tensor:
        """Position ids of a text, [tokens, 3]; see `_kept_ids`."""

    @cached_property
    def _ids(self) -> LayoutCache:
        return LayoutCache()

    def _kept_ids(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The same tensor of position ids every time: by that the transformer finds its layout again."""
        ids: torch.Tensor = self._ids.get(key, lambda: upload(make(), self._weight.device))
        return ids

    def _decode_latents(self, latents: torch.Tensor, request: DiffusionRequest) -> torch.Tensor:
        unpacked = self._unpack_latents(latents, request.height, request.width, self.vae_scale_factor)
        return decode_scaled(self.vae, unpacked)
