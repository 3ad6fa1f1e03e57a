"""What a request's latents are heading for, which a preview shows. Must not import vLLM."""

from __future__ import annotations

from typing import Any

import torch

_FLOW = "flow_prediction"  # diffusers' name of it in noise schedulers that know other kinds too


def estimated_final_latents(
    noise_scheduler: Any, noise_pred: torch.Tensor, index: int, latents: torch.Tensor
) -> torch.Tensor:
    """The latents at the end of a straight way from here: x0 = x_t - sigma_t * v, and after the last step the truth.

    Of a noise scheduler that does not predict flow it is the noisy latents themselves.

    Args:
        noise_scheduler: a request's own.
        noise_pred: of one step, all branches combined.
        index: number of that step, from 0 up.
        latents: before that step.
    """
    config = getattr(noise_scheduler, "config", {})
    is_flow = "FlowMatch" in type(noise_scheduler).__name__ or config.get("prediction_type") == _FLOW
    sigmas: Any = getattr(noise_scheduler, "sigmas", ())
    if not is_flow or index >= len(sigmas):
        return latents
    estimate = latents.float() + float(sigmas[-1] - sigmas[index]) * noise_pred.float()
    return estimate.to(latents.dtype)
