"""Wan text-to-video (2.1, and 2.2's 14B and 5B): the call for direct use; the rest is in `base.py`.

Must not import vLLM at module level.
"""

from __future__ import annotations

from diffusers.pipelines.wan.pipeline_wan import WanPipeline as DiffusersWanPipeline

from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.wan.base import WanBase


class WanPipeline(WanBase, DiffusersWanPipeline):
    """diffusers' WanPipeline with CFG-Parallel, for the engine or to be called directly."""

    def _requests(self, call: CallArguments) -> list[DiffusionRequest]:
        embeds = call.prompt_embeds, call.negative_prompt_embeds
        size, scale_2 = (call.height, call.width), call.guidance_scale_2
        self.check_inputs(call.prompt, call.negative_prompt, *size, *embeds, guidance_scale_2=scale_2)
        return super()._requests(call)
