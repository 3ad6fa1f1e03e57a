"""Random-weight Qwen-Image checkpoints of a few small sizes, made of diffusers' own classes.

Shared by all tests and by the benchmarks.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

TOKENIZER = Path(__file__).parents[2] / "examples/models/emoji/tokenizer"
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class ModelSize:
    """Shape of a transformer: width = heads * head_dim; rope_axes sum up to head_dim."""

    heads: int
    head_dim: int
    rope_axes: tuple[int, int, int]
    layers: int
    text_width: int = 48


SIZES = {
    "tiny": ModelSize(heads=2, head_dim=16, rope_axes=(4, 6, 6), layers=2),  # about a millisecond per forward
    "odd": ModelSize(heads=3, head_dim=20, rope_axes=(4, 8, 8), layers=2),  # no power of two divides its width
    "small": ModelSize(heads=4, head_dim=32, rope_axes=(8, 12, 12), layers=4),
}
# For the benchmarks: milliseconds per forward on one core at 64, 128 and 256 px.
BENCHMARK_SIZES = {
    "light": ModelSize(heads=4, head_dim=64, rope_axes=(16, 24, 24), layers=4),  # 5, 10, 30
    "mid": ModelSize(heads=6, head_dim=64, rope_axes=(16, 24, 24), layers=6),  # 15, 30, 90
}


def build_qwen_image(folder: Path, *, size: str = "tiny", seed: int = 0) -> Path:
    """Save a random Qwen-Image pipeline that diffusers can load; returns its folder.

    One image token is 16 x 16 pixels, and the noise schedule is the real Qwen-Image's.
    """
    shape = (SIZES | BENCHMARK_SIZES)[size]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = Qwen2Tokenizer.from_pretrained(TOKENIZER)
        QwenImagePipeline(
            scheduler=noise_scheduler(),
            vae=qwen_image_vae(),
            text_encoder=text_encoder(len(tokenizer), shape.text_width),
            tokenizer=tokenizer,
            transformer=transformer(shape),
        ).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(TOKENIZER / name, folder / "tokenizer" / name)
    return folder


def transformer(
    size: ModelSize, latent_channels: int = LATENT_CHANNELS, **conditioning: bool
) -> QwenImageTransformer2DModel:
    """A transformer with diffusers' own initial weights: predictions have a scale of about one, and text matters.

    Args:
        conditioning: what only some checkpoints have, as diffusers' configuration names it.
    """
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * latent_channels,
        out_channels=latent_channels,
        num_layers=size.layers,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.heads,
        joint_attention_dim=size.text_width,
        axes_dims_rope=size.rope_axes,
        **conditioning,
    )
    return model.eval().requires_grad_(False)


def noise_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of Qwen/Qwen-Image."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def qwen_image_vae(
    channels: int = 3, latent_channels: int = LATENT_CHANNELS, levels: int = 3
) -> AutoencoderKLQwenImage:
    """A VAE of images with so many channels; one latent pixel is 2**levels pixels wide and high."""
    vae = AutoencoderKLQwenImage(
        base_dim=4 if levels > 3 else 8,  # many levels are for images of a million pixels
        z_dim=latent_channels,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=1,
        input_channels=channels,
        temperal_downsample=[False, *[True] * (levels - 1)],
        latents_mean=[-0.5, 0.1, 0.0, 0.4] * (latent_channels // 4),
        latents_std=[1.2, 2.0, 1.5, 0.8] * (latent_channels // 4),
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(8)  # untrained, it would paint everything the same grey
    return vae.eval()


def text_encoder(vocabulary: int, width: int, **config: Any) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL; `config` goes over its configuration."""
    text = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"mrope_section": [4, 4, 4], "rope_type": "default", "type": "default", "rope_theta": 1e4},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **config)).eval()
