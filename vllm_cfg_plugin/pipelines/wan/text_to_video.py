"""Wan text-to-video (2.1, and 2.2's 14B and 5B): the call for direct use; the rest is in `base.py`.

Must not import vLLM at module level.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.pipelines.wan.pipeline_wan import WanPipeline as DiffusersWanPipeline
from transformers import AutoTokenizer, UMT5EncoderModel

from vllm_cfg_plugin.params import Guidance
from vllm_cfg_plugin.pipelines.common.generate import Generators
from vllm_cfg_plugin.pipelines.wan.base import TEXT_TOKENS, WanBase, adopt_experts
from vllm_cfg_plugin.pipelines.wan.vae import ThreadSafeWanVAE


class WanPipeline(WanBase, DiffusersWanPipeline):
    """diffusers' WanPipeline with CFG-Parallel, for the engine or to be called directly."""

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: WanTransformer3DModel,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__(
            tokenizer,
            text_encoder,
            ThreadSafeWanVAE.adopt(vae),
            scheduler,
            *adopt_experts(transformer, transformer_2, boundary_ratio),
            boundary_ratio,
            expand_timesteps,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int = TEXT_TOKENS,
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate videos; under `torchrun` every rank calls this alike and returns the same videos.

        Args:
            negative_prompt: None is an empty one.
            height, width: pixels.
            guidance_scale: guidance is on above 1.
            guidance_scale_2: of the steps of `transformer_2`; None for `guidance_scale`.
            generator, latents: source of the first latents, or these themselves.
            output_type: "np", "pil", "pt" or "latent".
        """
        embeds = prompt_embeds, negative_prompt_embeds
        self.check_inputs(prompt, negative_prompt, height, width, *embeds, guidance_scale_2=guidance_scale_2)
        height, width, num_frames = self._fitting(height, width, num_frames)
        frames = self._generate(
            self._texts(prompt, negative_prompt, prompt_embeds, guidance_scale),
            num_videos_per_prompt,
            generator,
            latents,
            output_type,
            embeds,
            (),
            attention_kwargs,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance=Guidance(scale=guidance_scale, scale_2=guidance_scale_2),
            max_sequence_length=max_sequence_length,
        )
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)
