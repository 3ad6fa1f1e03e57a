"""Wan's video VAE for several threads at once, on diffusers' own modules and weights; must not import vLLM.

Upstream walks through a video a few frames at a time and keeps what its causal convolutions need of earlier frames on
the model itself; encode and decode clear both's caches, so two calls at once would spoil each other.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DecoderOutput

from vllm_cfg_plugin.pipelines.common.adopt import become


class ThreadSafeWanVAE(AutoencoderKLWan):
    """diffusers' AutoencoderKLWan whose every encode and decode has feature caches of its own."""

    @classmethod
    def adopt(cls, vae: AutoencoderKLWan) -> Self:
        """Make a loaded VAE one for several threads: the object itself, see `become`."""
        return become(cls, vae)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        encoded: torch.Tensor = self._with_own_caches()._encode(x)
        return encoded

    def _decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        return self._with_own_caches()._decode(z, return_dict)

    def _with_own_caches(self) -> Any:
        """diffusers' VAE of the same modules and settings; the caches it makes are attributes of its own."""
        own = AutoencoderKLWan.__new__(AutoencoderKLWan)
        own.__dict__ = dict(self.__dict__)
        return own
