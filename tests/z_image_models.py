"""Random-weight Z-Image models of a few small sizes, made of diffusers' own classes."""

from __future__ import annotations

import torch
from diffusers import ZImageTransformer2DModel

from tests.models import ModelSize

LATENT_CHANNELS = 4


def transformer(size: ModelSize) -> ZImageTransformer2DModel:
    """A transformer with diffusers' own initial weights, but for the pad tokens: those would be zeros."""
    model = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=size.heads * size.head_dim,
        n_layers=size.layers,
        n_refiner_layers=1,
        n_heads=size.heads,
        n_kv_heads=size.heads,
        cap_feat_dim=size.text_width,
        axes_dims=list(size.rope_axes),
        axes_lens=[1024, 64, 64],
    )
    for token in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.normal_(token)
    return model.eval().requires_grad_(False)
