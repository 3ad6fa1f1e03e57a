"""Tiny random checkpoints of pipelines that no family stands for, made of diffusers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Tokenizer,
)

from tests.model_builders.qwen_image import TOKENIZER, text_encoder
from tests.model_builders.text import clip_text_model, clip_tokenizer, t5_encoder, t5_tokenizer
from tests.model_builders.vae import image_vae

LATENT_CHANNELS = 4
WIDTH = 32  # of texts
QWEN_WIDTH = 48


def build(class_name: str, folder: Path, seed: int = 0) -> Path:
    """Save a random pipeline of the class that diffusers can load; returns its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        components = COMPONENTS[class_name]()
        for component in components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        getattr(diffusers, class_name)(**components).save_pretrained(folder)
    return folder


def _unet(in_channels: int = LATENT_CHANNELS) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
        norm_num_groups=8,
    )


def _sdxl(in_channels: int = LATENT_CHANNELS) -> dict[str, Any]:
    return {
        "vae": image_vae(LATENT_CHANNELS),
        "text_encoder": clip_text_model(WIDTH),
        "text_encoder_2": clip_text_model(WIDTH, with_projection=True),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "unet": _unet(in_channels),
        "scheduler": diffusers.EulerDiscreteScheduler(),
    }


def _sd() -> dict[str, Any]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
    )
    return {
        "vae": image_vae(LATENT_CHANNELS),
        "text_encoder": clip_text_model(WIDTH),
        "tokenizer": clip_tokenizer(),
        "unet": unet,
        "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
    }


def _gemma() -> dict[str, Any]:
    config = Gemma2Config(
        vocab_size=len(Qwen2Tokenizer.from_pretrained(TOKENIZER)),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return {"text_encoder": Gemma2Model(config), "tokenizer": Qwen2Tokenizer.from_pretrained(TOKENIZER)}


def _lumina2() -> dict[str, Any]:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return {
        **_gemma(),
        "vae": image_vae(LATENT_CHANNELS, levels=4),
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


def _sana() -> dict[str, Any]:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=16,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return {**_gemma(), "vae": vae, "transformer": transformer, "scheduler": scheduler}


def _kandinsky5() -> dict[str, Any]:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=LATENT_CHANNELS,
        in_text_dim=QWEN_WIDTH,
        in_text_dim2=WIDTH,
        time_dim=32,
        out_visual_dim=LATENT_CHANNELS,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(8, 8, 8),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    tokenizer = Qwen2Tokenizer.from_pretrained(TOKENIZER)
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": text_encoder(len(tokenizer), QWEN_WIDTH),
        "tokenizer": tokenizer,
        "text_encoder_2": clip_text_model(WIDTH),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


def _cogview4() -> dict[str, Any]:
    tokenizer = Qwen2Tokenizer.from_pretrained(TOKENIZER)
    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=16,
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": GlmModel(config),
        "vae": image_vae(LATENT_CHANNELS, levels=4),
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    }


def _hidream() -> dict[str, Any]:
    tokenizer = Qwen2Tokenizer.from_pretrained(TOKENIZER)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
    )
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": image_vae(LATENT_CHANNELS, levels=2),
        "text_encoder": clip_text_model(WIDTH, with_projection=True),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text_model(WIDTH, with_projection=True),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5_encoder(WIDTH),
        "tokenizer_3": t5_tokenizer(),
        "text_encoder_4": LlamaForCausalLM(config),
        "tokenizer_4": tokenizer,
        "transformer": transformer,
    }


def _pixart() -> dict[str, Any]:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        use_additional_conditions=False,
        norm_num_groups=4,
    )
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_encoder(WIDTH),
        "vae": image_vae(LATENT_CHANNELS, levels=4),
        "transformer": transformer,
        "scheduler": diffusers.DPMSolverMultistepScheduler(),
    }


def _cogvideox() -> dict[str, Any]:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=64,
        use_rotary_positional_embeddings=True,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_encoder(WIDTH),
        "vae": vae,
        "transformer": transformer,
        "scheduler": diffusers.CogVideoXDDIMScheduler(),
    }


def _ltx() -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae,
        "text_encoder": t5_encoder(WIDTH),
        "tokenizer": t5_tokenizer(),
        "transformer": transformer,
    }


COMPONENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "StableDiffusionPipeline": _sd,
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusionXLImg2ImgPipeline": _sdxl,
    "StableDiffusionXLInpaintPipeline": _sdxl,
    "StableDiffusionXLInstructPix2PixPipeline": lambda: _sdxl(2 * LATENT_CHANNELS),
    "Lumina2Pipeline": _lumina2,
    "SanaPipeline": _sana,
    "Kandinsky5T2VPipeline": _kandinsky5,
    "CogView4Pipeline": _cogview4,
    "HiDreamImagePipeline": _hidream,
    "PixArtSigmaPipeline": _pixart,
    "CogVideoXPipeline": _cogvideox,
    "LTXPipeline": _ltx,
}
