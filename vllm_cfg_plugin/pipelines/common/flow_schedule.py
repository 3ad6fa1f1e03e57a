"""Timesteps of the flow-matching image families, as their diffusers pipelines set them; must not import vLLM."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.pipelines.base import begin


def set_flow_timesteps(scheduler: Any, num_inference_steps: int, image_tokens: int, device: torch.device) -> None:
    """Set a noise scheduler to the first of its steps, as the pipelines of Qwen-Image, Flux and LongCat-Image do.

    Raises:
        InvalidRequestError: too few steps for this noise schedule.
    """
    sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    shift = dynamic_shift(scheduler.config, image_tokens, max_shift=1.15)
    set_shifted_timesteps(scheduler, num_inference_steps, sigmas, shift, device)


def set_shifted_timesteps(
    scheduler: Any,
    num_inference_steps: int,
    sigmas: Any,
    shift: float,
    device: torch.device,
) -> None:
    """Set a noise scheduler to the first of its steps.

    Args:
        sigmas: of the steps before it shifts them, of the type that diffusers' pipeline passes, as some noise
            schedulers take one type alone; None for the noise scheduler's own.

    Raises:
        InvalidRequestError: too few steps for this noise schedule.
    """
    if scheduler.config.get("shift_terminal") and num_inference_steps < 2:
        # The schedule is stretched between its first and last sigma: upstream divides by zero with one step.
        raise InvalidRequestError("num_inference_steps", num_inference_steps, "at least 2 for this model")
    retrieve_timesteps(scheduler, num_inference_steps, device, sigmas=sigmas, mu=shift)
    begin(scheduler)


def dynamic_shift(config: Any, image_tokens: int, max_shift: float) -> float:
    """How far a noise scheduler of this configuration shifts towards noise for an image of so many tokens.

    Args:
        max_shift: the pipeline's own, for configurations that don't say.
    """
    shift: float = calculate_shift(
        image_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )
    return shift
