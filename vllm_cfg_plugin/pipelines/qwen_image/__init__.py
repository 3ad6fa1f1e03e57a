"""Qwen-Image: text-to-image, editing, layered images."""

from vllm_cfg_plugin.pipelines.qwen_image.cfg_parallel import QwenImageCFGParallelMixin
from vllm_cfg_plugin.pipelines.qwen_image.edit import QwenImageEditPipeline, QwenImageEditPlusPipeline
from vllm_cfg_plugin.pipelines.qwen_image.layered import QwenImageLayeredPipeline
from vllm_cfg_plugin.pipelines.qwen_image.pipeline import QwenImagePipeline

__all__ = [
    "QwenImageCFGParallelMixin",
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline",
    "QwenImagePipeline",
]
