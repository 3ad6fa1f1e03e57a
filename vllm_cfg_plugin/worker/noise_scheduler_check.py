"""Whether a checkpoint's noise scheduler can do what requests will ask of it; must not import vLLM."""

from __future__ import annotations

import torch

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import EnginePipeline, generator_of
from vllm_cfg_plugin.pipelines.sample_request import sample_request

_SMALL = 0.25  # sides of the latents that are stepped, against those of the model's own size


@torch.inference_mode()
def check_noise_scheduler(pipeline: EnginePipeline, info: PipelineInfo) -> None:
    """Take all steps of the checkpoint's noise scheduler, before a request finds out that they can't be taken.

    Raises:
        ConfigurationError: the family can't set or step it, it takes other timesteps than `info` says, or it draws
            noise that does not follow from the request's seed.
    """
    name = type(pipeline.scheduler).__name__
    try:
        problem = _problem(pipeline, sample_request(info, _SMALL))
    except Exception as error:
        problem = str(error) or type(error).__name__
    if problem:
        raise ConfigurationError(
            f"scheduler/scheduler_config.json: {name} can't be this model's noise scheduler: {problem}"
        )


def _problem(pipeline: EnginePipeline, request: DiffusionRequest) -> str:
    """Why a request can't be denoised with it; '' if it can."""
    timesteps = len(pipeline.make_noise_scheduler(request).timesteps)
    if timesteps != request.steps:
        return f"it takes {timesteps} timesteps where `describe` says {request.steps}"
    latents, again = (_final_latents(pipeline, request, global_seed) for global_seed in (0, 1))
    if not torch.isfinite(latents).all():
        return f"latents are not finite after its {timesteps} steps"
    if not torch.equal(latents, again):
        return "it draws noise that does not follow from a request's seed"
    return ""


def _final_latents(pipeline: EnginePipeline, request: DiffusionRequest, global_seed: int) -> torch.Tensor:
    """What becomes of a request's first latents where every prediction is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(global_seed)
        generator = generator_of(request)
        scheduler = pipeline.make_noise_scheduler(request)
        latents = pipeline.draw_noise(request, generator)
        zeros = pipeline.prediction_like.new_zeros(1, *pipeline.prediction_shape(request))
        for timestep in scheduler.timesteps:
            stepped = pipeline.step_latents(scheduler, zeros, timestep, latents, generator)
            if stepped.shape != latents.shape or not stepped.is_floating_point():
                raise ValueError(f"of latents {_kind(latents)} its step makes {_kind(stepped)}")
            latents = stepped
    return latents


def _kind(tensor: torch.Tensor) -> str:
    return f"{[*tensor.shape]} of {tensor.dtype}"
