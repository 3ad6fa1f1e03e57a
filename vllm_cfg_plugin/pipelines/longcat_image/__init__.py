"""LongCat-Image: text-to-image and editing."""

from vllm_cfg_plugin.pipelines.longcat_image.edit import LongCatImageEditPipeline
from vllm_cfg_plugin.pipelines.longcat_image.pipeline import LongCatImagePipeline

__all__ = ["LongCatImageEditPipeline", "LongCatImagePipeline"]
