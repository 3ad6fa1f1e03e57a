"""Z-Image."""

from vllm_cfg_plugin.pipelines.z_image.pipeline import ZImagePipeline

__all__ = ["ZImagePipeline"]
