"""Random-weight Flux checkpoints of a few small sizes, made of diffusers' own classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from tests.model_builders.mmdit import LATENT_CHANNELS, POOLED, flux_transformer
from tests.model_builders.qwen_image import SIZES
from tests.model_builders.text import clip_text_model, clip_tokenizer, t5_encoder, t5_tokenizer
from tests.model_builders.vae import image_vae


def build_flux(folder: Path, *, size: str = "tiny", seed: int = 0, is_distilled: bool = False) -> Path:
    """Save a random Flux pipeline that diffusers can load; returns its folder.

    One image token is 8 x 8 pixels.
    """
    shape = SIZES[size]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
            vae=image_vae(LATENT_CHANNELS),
            text_encoder=clip_text_model(POOLED),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5_encoder(shape.text_width),
            tokenizer_2=t5_tokenizer(),
            transformer=flux_transformer(shape, guidance_embeds=is_distilled),
        ).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"height": 128, "width": 128}))
    return folder
