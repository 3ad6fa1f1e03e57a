"""Qwen-Image text-to-image, on diffusers' own methods.

Must not import vLLM at module level.
"""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline as DiffusersQwenImagePipeline
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

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

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLQwenImage,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        transformer: QwenImageTransformer2DModel,
    ) -> None:
        super().__init__(scheduler, vae, transformer, text_encoder=text_encoder, tokenizer=tokenizer)

    def _asked(self, call: CallArguments) -> Asked:
        height, width = self._size(call)
        most = call.max_sequence_length
        self.check_inputs(call.prompt, height, width, call.negative_prompt, max_sequence_length=most)
        texts, fields = self._guided(call)
        return texts, fields | {"height": height, "width": width}
