"""Qwen-Image text-to-image, on diffusers' own methods.

Must not import vLLM at module level.
"""

from __future__ import annotations

from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline as DiffusersQwenImagePipeline

from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.image_pipeline import Asked
from vllm_cfg_plugin.pipelines.qwen_image.base import (
    PROMPT_RULES,
    QwenImageBase,
    describe_qwen_image,
)


class QwenImagePipeline(QwenImageBase, DiffusersQwenImagePipeline):
    """diffusers' QwenImagePipeline with CFG-Parallel, for the engine or to be called directly."""

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        return describe_qwen_image(checkpoint, PROMPT_RULES, {})

    def _asked(self, call: CallArguments) -> Asked:
        height, width = self._size(call)
        most = call.max_sequence_length
        self.check_inputs(call.prompt, height, width, call.negative_prompt, max_sequence_length=most)
        texts, fields = self._guided(call)
        return texts, fields | {"height": height, "width": width}
