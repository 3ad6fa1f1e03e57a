"""Random-weight Wan transformers and VAEs of the layouts that exist, made of diffusers' own classes; for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

TEXT_WIDTH = 24
IMAGE_WIDTH = 20
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class ModelSize:
    """Shape of a transformer: width = heads * head_dim."""

    heads: int = 2
    head_dim: int = 16
    layers: int = 2


SIZES = {
    "tiny": ModelSize(),
    "odd": ModelSize(heads=3, head_dim=20),  # no power of two divides its width
}


def wan_transformer(
    size: ModelSize = SIZES["tiny"],
    *,
    in_channels: int = LATENT_CHANNELS,
    with_image: bool = False,
    image_tokens: int | None = None,
) -> WanTransformer3DModel:
    """A transformer with diffusers' own initial weights.

    Args:
        in_channels: the latents' own and, for image-to-video of all but the 5B layout, those of mask and condition.
        with_image: the cross attention of Wan 2.1's image-to-video models to the embeddings of an image.
        image_tokens: of a first and a last image together, where their embeddings have positions.
    """
    model = WanTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=3 * size.heads * size.head_dim,
        num_layers=size.layers,
        image_dim=IMAGE_WIDTH if with_image else None,
        added_kv_proj_dim=size.heads * size.head_dim if with_image else None,
        rope_max_seq_len=64,
        pos_embed_seq_len=image_tokens,
    )
    return model.eval().requires_grad_(False)


def wan_vae(*, is_residual: bool = False) -> AutoencoderKLWan:
    """A VAE of 4 frames and 8 x 8 pixels to one latent, or with `is_residual` the 5B layout's of 16 x 16 pixels."""
    layout = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.5, 0.1, 0.0, 0.4],
        latents_std=[1.2, 2.0, 1.5, 0.8],
        **(layout if is_residual else {}),
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(8)  # untrained, it would paint everything the same grey
    return vae.eval().requires_grad_(False)


def wan_scheduler(flow_shift: float = 3.0) -> UniPCMultistepScheduler:
    """The noise scheduler of the Wan checkpoints."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
