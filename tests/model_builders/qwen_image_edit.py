"""Random-weight checkpoints of the Qwen-Image pipelines that take images, made of diffusers' own classes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImageLayeredPipeline
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer, Qwen2VLProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from tests.model_builders.qwen_image import (
    LATENT_CHANNELS,
    SIZES,
    TOKENIZER,
    noise_scheduler,
    qwen_image_vae,
    text_encoder,
    transformer,
)
from vllm_cfg_plugin.compat.libraries import let_vl_processors_do_without_videos
from vllm_cfg_plugin.pipelines.qwen_image.base import PROMPT_TEMPLATE
from vllm_cfg_plugin.pipelines.qwen_image.edit import EDIT_TEMPLATE


def build_qwen_image_edit(folder: Path, *, seed: int = 0, levels: int = 3) -> Path:
    """Save a random Qwen-Image-Edit pipeline that diffusers can load; returns its folder.

    Args:
        levels: of the autoencoder; one image token is 2 * 2**levels pixels wide and high. With 5 the million pixels of
            a condition are 256 tokens; diffusers' sizes are multiples of such a token where images are square.
    """
    return _build(QwenImageEditPipeline, folder, seed, levels)


def build_qwen_image_edit_plus(folder: Path, *, seed: int = 0, levels: int = 3, zero_cond_t: bool = True) -> Path:
    """Save a random Qwen-Image-Edit-2511 pipeline; without `zero_cond_t` it is of the kind of 2509."""
    return _build(QwenImageEditPlusPipeline, folder, seed, levels, zero_cond_t=zero_cond_t)


def build_qwen_image_layered(folder: Path, *, seed: int = 0, levels: int = 3) -> Path:
    """Save a random Qwen-Image-Layered pipeline; by default it makes 2 layers."""
    conditioning = {"use_additional_t_cond": True, "use_layer3d_rope": True}
    # diffusers takes an image for latents where it has as many channels.
    channels = {"channels": 4, "latent_channels": 8}
    return _build(QwenImageLayeredPipeline, folder, seed, levels, **channels, defaults={"layers": 2}, **conditioning)


def _build(
    pipeline_class: Any,
    folder: Path,
    seed: int,
    levels: int,
    channels: int = 3,
    latent_channels: int = LATENT_CHANNELS,
    defaults: dict[str, int] | None = None,
    **conditioning: bool,
) -> Path:
    shape = SIZES["tiny"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = edit_tokenizer()
        model = transformer(shape, latent_channels, **conditioning)
        pipeline_class(
            scheduler=noise_scheduler(),
            vae=qwen_image_vae(channels, latent_channels, levels),
            text_encoder=text_encoder(len(tokenizer), shape.text_width, **_vision_tokens(tokenizer)),
            tokenizer=tokenizer,
            processor=_processor(tokenizer),
            transformer=model,
        ).save_pretrained(folder)
    if defaults:
        (folder / "generation_config.json").write_text(json.dumps(defaults))
    return folder


def edit_tokenizer() -> Qwen2Tokenizer:
    """The bundled model's, with the editing template's words as tokens of their own.

    diffusers drops the template's first 64 states, its prefix in Qwen's own vocabulary, so it has to be as long here.
    """
    tokenizer = Qwen2Tokenizer.from_pretrained(TOKENIZER)
    prefix = EDIT_TEMPLATE.split("{}")[0]
    words = [word for word in re.findall(r" [A-Za-z]+", prefix) if len(tokenizer(word).input_ids) > 1]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in [*words, "(color", "),"]])
    lengths = [len(tokenizer(text.split("{}")[0]).input_ids) for text in (EDIT_TEMPLATE, PROMPT_TEMPLATE)]
    if lengths != [64, 34]:
        raise RuntimeError(f"the templates' prefixes are {lengths} tokens, not [64, 34]")
    return tokenizer


def _processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """A processor that brings images to at most 16 tokens."""
    let_vl_processors_do_without_videos()
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16)
    return Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor() if is_torchvision_available() else None)


def _vision_tokens(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """What a Qwen2.5-VL's configuration says of the tokens that stand for images."""
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}
