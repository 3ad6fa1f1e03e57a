"""Qwen-Image text-to-image, on diffusers' own methods.

Must not import vLLM at module level.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline as DiffusersQwenImagePipeline
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo
from vllm_cfg_plugin.pipelines.common.generate import Generators
from vllm_cfg_plugin.pipelines.qwen_image.base import (
    MAX_TEXT_TOKENS,
    PROMPT_RULES,
    QwenImageBase,
    describe_qwen_image,
)


class QwenImagePipeline(QwenImageBase, DiffusersQwenImagePipeline):
    """diffusers' QwenImagePipeline with CFG-Parallel, for the engine or to be called directly."""

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        return describe_qwen_image(checkpoint, PROMPT_RULES, {})

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLQwenImage,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        transformer: QwenImageTransformer2DModel,
    ) -> None:
        super().__init__(scheduler, vae, transformer, text_encoder=text_encoder, tokenizer=tokenizer)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        max_sequence_length: int = MAX_TEXT_TOKENS,
        cfg_normalize: bool = True,
    ) -> QwenImagePipelineOutput | tuple[Any]:
        """Generate images; under `torchrun` every rank calls this alike and returns the same images.

        Args:
            negative_prompt: None switches guidance off; an empty string is a negative prompt.
            guidance_scale, true_cfg_scale: two names of the guidance scale, which is on above 1; `true_cfg_scale` wins.
            height, width: pixels.
            generator, latents: source of the first latents, or these themselves.
            output_type: "pil", "np", "pt" or "latent".
            cfg_normalize: whether the guided prediction is brought back to the positive one's norm.

        Raises:
            InvalidRequestError: too few steps for this checkpoint's noise schedule.
        """
        height, width = self._size(height, width)
        self.check_inputs(prompt, height, width, negative_prompt, max_sequence_length=max_sequence_length)
        images = self._generate_guided(
            prompt,
            negative_prompt,
            guidance_scale,
            true_cfg_scale,
            cfg_normalize,
            num_images_per_prompt,
            generator,
            latents,
            output_type,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            max_sequence_length=max_sequence_length,
        )
        return QwenImagePipelineOutput(images=images) if return_dict else (images,)
