"""Stable Diffusion 3."""

from vllm_cfg_plugin.pipelines.sd3.pipeline import StableDiffusion3Pipeline

__all__ = ["StableDiffusion3Pipeline"]
