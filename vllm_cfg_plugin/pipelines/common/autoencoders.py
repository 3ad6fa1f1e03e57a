"""Decoding by diffusers' autoencoders as the end of its pipelines' `__call__` does it; must not import vLLM."""

from __future__ import annotations

from typing import Any

import torch

from vllm_cfg_plugin.checkpoint import Checkpoint


def vae_scale_factor(checkpoint: Checkpoint) -> int:
    """Pixels each way that one latent pixel of a checkpoint's AutoencoderKL stands for."""
    scale: int = 2 ** (len(checkpoint.component_config("vae")["block_out_channels"]) - 1)
    return scale


def decode_scaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """[batch, 3, height, width] in -1..1 by an AutoencoderKL from latents [batch, channels, height, width]."""
    scaled = (latents / vae.config.scaling_factor) + vae.config.shift_factor
    image: torch.Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    return image


def decode_standardised(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """[batch, channels, frames, height, width] in -1..1 by a VAE that knows its latents' means and deviations.

    Args:
        latents: [batch, latent channels, latent frames, latent height, latent width].
    """
    latents, config = latents.to(vae.dtype), vae.config
    mean, std = (
        torch.tensor(values).view(1, config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)
        for values in (config.latents_mean, config.latents_std)
    )
    decoded: torch.Tensor = vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
    return decoded
