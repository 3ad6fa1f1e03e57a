"""Random-weight Wan checkpoints of the layouts that exist, made of diffusers' own classes; for tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.model_builders.qwen_image import TOKENIZER
from vllm_cfg_plugin.checkpoint import DEFAULTS_FILE

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


# What each checkpoint layout of Wan is made of; the keys of `build_wan`.
LAYOUTS: dict[str, dict[str, Any]] = {
    "2.1": {},
    "2.2": {"boundary_ratio": 0.875},
    "5b": {"expand_timesteps": True},
    "2.1-image": {"with_embeddings": True, "with_channels": True},
    "2.2-image": {"boundary_ratio": 0.9, "with_channels": True},
    "5b-image": {"expand_timesteps": True},
}


def build_wan(folder: Path, layout: str, seed: int = 0) -> Path:
    """Save a random Wan pipeline that diffusers can load, with a small default size; returns its folder.

    Args:
        layout: one of `LAYOUTS`; those that end in "-image" are image-to-video pipelines.
    """
    options = dict(LAYOUTS[layout])
    with_embeddings = options.pop("with_embeddings", False)
    channels = 2 * LATENT_CHANNELS + 4 if options.pop("with_channels", False) else LATENT_CHANNELS
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = Qwen2Tokenizer.from_pretrained(TOKENIZER)
        experts = [
            wan_transformer(in_channels=channels, with_image=with_embeddings)
            for _ in range(2 if "boundary_ratio" in options else 1)
        ]
        parts = {
            "tokenizer": tokenizer,
            "text_encoder": _text_encoder(len(tokenizer)),
            "vae": wan_vae(is_residual="expand_timesteps" in options),
            "scheduler": wan_scheduler(),
            "transformer": experts[0],
            "transformer_2": experts[1] if len(experts) > 1 else None,
        }
        if not layout.endswith("-image"):
            pipeline = WanPipeline(**parts, **options)
        else:
            encoder, processor = _image_encoder() if with_embeddings else (None, None)
            pipeline = WanImageToVideoPipeline(**parts, **options, image_encoder=encoder, image_processor=processor)
        pipeline.save_pretrained(folder)
    (folder / DEFAULTS_FILE).write_text(json.dumps({"height": 64, "width": 64, "num_frames": 5}))
    return folder


def _text_encoder(vocabulary: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    encoder = UMT5EncoderModel(config).eval()
    with torch.no_grad():  # untrained, a few words among 512 rows would change next to nothing
        encoder.encoder.final_layer_norm.weight.mul_(16)
    return encoder


def _image_encoder() -> tuple[CLIPVisionModel, CLIPImageProcessor]:
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return CLIPVisionModel(config).eval(), processor
