"""A Qwen-Image of real width and random weights, and requests for it that need no text encoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers import QwenImagePipeline as DiffusersQwenImagePipeline

from tests.model_builders.qwen_image import noise_scheduler, qwen_image_vae
from vllm_cfg_plugin.params import DiffusionRequest, Guidance
from vllm_cfg_plugin.pipelines.base import PromptEmbeds
from vllm_cfg_plugin.pipelines.quantized import quantize_layers
from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline

TEXT_TOKENS = 64
SCALE = 4.0
PIXELS_PER_TOKEN = 16


def transformer(layers: int, is_tiny: bool, dtype: torch.dtype, device: torch.device) -> QwenImageTransformer2DModel:
    """Random weights, alike for equal arguments."""
    shape: dict[str, Any] = {"num_layers": layers}
    if is_tiny:
        shape |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 48}
        shape["axes_dims_rope"] = (4, 6, 6)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            return QwenImageTransformer2DModel(in_channels=64, out_channels=16, **shape).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def pipelines(model: QwenImageTransformer2DModel, cls: type) -> Any:
    """A pipeline of a class around a transformer; its VAE only says how latents look."""
    scheduler: FlowMatchEulerDiscreteScheduler = noise_scheduler()
    # diffusers' own `to` warns of what it keeps in float32.
    vae = torch.nn.Module.to(qwen_image_vae(latent_channels=16), model.device, model.dtype)
    pipeline = cls(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(model: QwenImageTransformer2DModel, quantization: str = "") -> QwenImagePipeline:
    """Our pipeline; its texts are random embeddings that follow from the request and the branch."""
    if quantization:
        quantize_layers(model, quantization, model.device)
    pipeline: QwenImagePipeline = pipelines(model, QwenImagePipeline)

    def encode_branch(request: DiffusionRequest, branch: int) -> PromptEmbeds:
        return PromptEmbeds(random_text(model, request.seed, branch))

    pipeline.encode_branch = encode_branch  # type: ignore[method-assign]
    return pipeline


def diffusers_own(model: QwenImageTransformer2DModel) -> DiffusersQwenImagePipeline:
    pipeline: DiffusersQwenImagePipeline = pipelines(model, DiffusersQwenImagePipeline)
    return pipeline


def random_text(model: QwenImageTransformer2DModel, seed: int, branch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2 * seed + branch)
    width = model.config["joint_attention_dim"]
    return torch.randn(TEXT_TOKENS, width, generator=generator).to(model.device, model.dtype)


def requests(count: int, side: int, steps: int) -> list[DiffusionRequest]:
    """Guided requests for images of so many pixels a side."""
    return [
        DiffusionRequest(
            prompts=["positive", "negative"],
            text_tokens=[TEXT_TOKENS] * 2,
            image_tokens=(side // PIXELS_PER_TOKEN) ** 2,
            height=side,
            width=side,
            num_inference_steps=steps,
            num_timesteps=steps,
            guidance=Guidance(scale=SCALE),
            seed=seed,
        )
        for seed in range(count)
    ]
