"""The cfg group and the mixin that runs a pipeline's branches on its ranks."""

from vllm_cfg_plugin.distributed.parallel_state import (
    destroy_model_parallel,
    get_cfg_group,
    get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size,
    initialize_model_parallel,
)

__all__ = [
    "destroy_model_parallel",
    "get_cfg_group",
    "get_classifier_free_guidance_rank",
    "get_classifier_free_guidance_world_size",
    "initialize_model_parallel",
]
