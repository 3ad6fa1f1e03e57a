"""Wan text-to-video (2.1, and 2.2's 14B and 5B): the call for direct use; the rest is in `base.py`.

Must not import vLLM at module level.
"""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline as DiffusersWanPipeline
from transformers import AutoTokenizer, UMT5EncoderModel

from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.wan.base import WanBase, adopt_experts
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

    def _requests(self, call: CallArguments) -> list[DiffusionRequest]:
        embeds = call.prompt_embeds, call.negative_prompt_embeds
        size, scale_2 = (call.height, call.width), call.guidance_scale_2
        self.check_inputs(call.prompt, call.negative_prompt, *size, *embeds, guidance_scale_2=scale_2)
        return super()._requests(call)
