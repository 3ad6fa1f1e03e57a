"""A small random AuraFlow checkpoint, made of diffusers' own classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import Qwen2Tokenizer, UMT5Config, UMT5EncoderModel

from tests.model_builders.qwen_image import TOKENIZER
from vllm_cfg_plugin.checkpoint import DEFAULTS_FILE

LATENT_CHANNELS = 4
TEXT_WIDTH = 24


def build_aura_flow(folder: Path, seed: int = 0) -> Path:
    """Save a random AuraFlow pipeline that diffusers can load; returns its folder. One token is 4 x 4 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = Qwen2Tokenizer.from_pretrained(TOKENIZER)
        text = UMT5Config(
            vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
        )
        AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(text).eval(),
            vae=_vae(),
            transformer=AuraFlowTransformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=TEXT_WIDTH,
                caption_projection_dim=32,
                pos_embed_max_size=256,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        ).save_pretrained(folder)
    (folder / DEFAULTS_FILE).write_text(json.dumps({"height": 32, "width": 32, "num_inference_steps": 6}))
    return folder


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=LATENT_CHANNELS,
        scaling_factor=0.13025,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(8)  # untrained, it would paint everything the same grey
    return vae.eval()
