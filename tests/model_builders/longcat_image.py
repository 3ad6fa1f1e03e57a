"""Random-weight LongCat-Image checkpoints of a few small sizes, made of diffusers' own classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.model_builders.mmdit import longcat_image_transformer
from tests.model_builders.qwen_image import SIZES, TOKENIZER, text_encoder
from tests.model_builders.vae import image_vae

LATENT_CHANNELS = 16  # diffusers' pipelines know no other number
VISION_PIXELS = 56 * 56  # an image is no more than so many pixels to the text encoder


def build_longcat_image(folder: Path, *, size: str = "tiny", seed: int = 0, levels: int = 3) -> Path:
    """Save a random LongCat-Image pipeline that diffusers can load; returns its folder.

    Its `text_processor` is the image processor alone: the rest needs torchvision.

    Args:
        levels: of the autoencoder; one image token is 2**levels pixels wide and high.
    """
    shape = SIZES[size]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = Qwen2Tokenizer.from_pretrained(TOKENIZER)
        LongCatImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
            vae=image_vae(LATENT_CHANNELS, levels),
            text_encoder=_text_encoder(tokenizer, shape.text_width),
            tokenizer=tokenizer,
            text_processor=None,
            transformer=longcat_image_transformer(shape, in_channels=4 * LATENT_CHANNELS),
        ).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(TOKENIZER / name, folder / "tokenizer" / name)
    pixels = {"shortest_edge": 28 * 28, "longest_edge": VISION_PIXELS}
    Qwen2VLImageProcessorPil(size=pixels).save_pretrained(folder / "text_processor")
    _rewrite_index(folder, text_processor=["transformers", "Qwen2VLProcessor"])
    (folder / "generation_config.json").write_text(json.dumps({"height": 128, "width": 128}))
    return folder


def build_longcat_image_edit(folder: Path, *, size: str = "tiny", seed: int = 0) -> Path:
    """The same for editing; one image token is 64 x 64 pixels, as its images have a million of them."""
    build_longcat_image(folder, size=size, seed=seed, levels=6)
    _rewrite_index(folder, _class_name="LongCatImageEditPipeline")
    return folder


def _text_encoder(tokenizer: Qwen2Tokenizer, width: int) -> Qwen2_5_VLForConditionalGeneration:
    """An encoder whose attention is strong: most of a text is padding, which learns of the rest by that alone."""
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    encoder = text_encoder(len(tokenizer), width, image_token_id=image_token)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(("v_proj.weight", "o_proj.weight")):
                parameter.mul_(16)
    return encoder


def _rewrite_index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
