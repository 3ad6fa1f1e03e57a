"""Random-weight Stable Diffusion 3 checkpoints of a few small sizes, made of diffusers' own classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from tests.model_builders.mmdit import LATENT_CHANNELS, POOLED, sd3_transformer
from tests.model_builders.qwen_image import SIZES
from tests.model_builders.text import clip_text_model, clip_tokenizer, t5_encoder, t5_tokenizer
from tests.model_builders.vae import image_vae


def build_sd3(folder: Path, *, size: str = "tiny", seed: int = 0, has_t5: bool = True, is_3_5: bool = True) -> Path:
    """Save a random Stable Diffusion 3 pipeline that diffusers can load; returns its folder.

    One image token is 8 x 8 pixels.

    Args:
        has_t5: False leaves out the largest text encoder, as users do to save memory.
        is_3_5: with normalised queries and keys, a second attention in the first block and dynamic shifting.
    """
    shape = SIZES[size]
    newer = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if is_3_5 else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=is_3_5),
            vae=image_vae(LATENT_CHANNELS),
            text_encoder=clip_text_model(POOLED // 2, with_projection=True),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_text_model(POOLED // 2, with_projection=True),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(shape.text_width) if has_t5 else None,
            tokenizer_3=t5_tokenizer() if has_t5 else None,
            transformer=sd3_transformer(shape, **newer),
        ).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"height": 128, "width": 128}))
    return folder
