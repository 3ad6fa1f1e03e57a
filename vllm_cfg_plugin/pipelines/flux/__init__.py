"""Flux."""

from vllm_cfg_plugin.pipelines.flux.pipeline import FluxPipeline

__all__ = ["FluxPipeline"]
