"""Small random image autoencoders."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL


def image_vae(channels: int, levels: int = 3) -> AutoencoderKL:
    """An autoencoder that scales down by two for every level after the first."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(2)  # untrained, it would paint everything nearly the same grey
    return vae.eval()
