"""Wan 2.1 and 2.2: text-to-video and image-to-video."""

from vllm_cfg_plugin.pipelines.wan.image_to_video import WanImageToVideoPipeline
from vllm_cfg_plugin.pipelines.wan.text_to_video import WanPipeline

__all__ = ["WanImageToVideoPipeline", "WanPipeline"]
