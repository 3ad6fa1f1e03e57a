"""Small random transformers of Flux, LongCat-Image and Stable Diffusion 3."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, LongCatImageTransformer2DModel, SD3Transformer2DModel

from tests.model_builders.qwen_image import ModelSize

LATENT_CHANNELS = 4
POOLED = 24


def flux_transformer(size: ModelSize, **config: Any) -> FluxTransformer2DModel:
    """Layers of both kinds; `config` goes over it."""
    return _ready(FluxTransformer2DModel(**_single_stream(size) | config))


def longcat_image_transformer(size: ModelSize, **config: Any) -> LongCatImageTransformer2DModel:
    """Layers of both kinds; `config` goes over it."""
    return _ready(LongCatImageTransformer2DModel(**_single_stream(size) | config))


def sd3_transformer(size: ModelSize, **config: Any) -> SD3Transformer2DModel:
    """Position embeddings for up to 24 x 24 tokens; `config` goes over it."""
    width = size.heads * size.head_dim
    return _ready(
        SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=size.layers,
            attention_head_dim=size.head_dim,
            num_attention_heads=size.heads,
            joint_attention_dim=size.text_width,
            caption_projection_dim=width,
            pooled_projection_dim=POOLED,
            pos_embed_max_size=24,
            **config,
        )
    )


def _single_stream(size: ModelSize) -> dict[str, Any]:
    return {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": size.layers,
        "num_single_layers": size.layers,
        "attention_head_dim": size.head_dim,
        "num_attention_heads": size.heads,
        "joint_attention_dim": size.text_width,
        "pooled_projection_dim": POOLED,
        "axes_dims_rope": size.rope_axes,
    }


def _ready(model: Any) -> Any:
    """For inference; no norm's weight or layer's bias keeps its initial one or zero, where a mistake would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval().requires_grad_(False)
