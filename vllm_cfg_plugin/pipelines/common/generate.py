"""What the pipelines' direct calls have in common: when guidance is on, and the loop; must not import vLLM."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_cfg_plugin.distributed.cfg_parallel import CFGParallelMixin, Kwargs, log_once


class DenoisingMixin(CFGParallelMixin):
    """The denoising loop of families whose branches differ in fixed arguments of the transformer alone."""

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        shared: Callable[[torch.Tensor, torch.Tensor], Kwargs],
        positive: Kwargs,
        negative: Kwargs,
        do_true_cfg: bool,
        true_cfg_scale: float,
        cfg_normalize: bool | float,
        output_slice: int | None = None,
    ) -> torch.Tensor:
        """The latents after all timesteps; every rank returns the same.

        Args:
            latents: [batch, ...].
            timesteps: the noise scheduler's.
            shared: the arguments of both branches, from latents and timestep [batch].
            positive, negative: those of one branch alone.
            cfg_normalize: as the family's `combine_cfg_noise` reads it.
            output_slice: see `predict_noise_maybe_with_cfg`.
        """
        for t in timesteps:
            both = shared(latents, t.expand(latents.shape[0]).to(latents.device))
            noise_pred = self.predict_noise_maybe_with_cfg(
                do_true_cfg=do_true_cfg,
                true_cfg_scale=true_cfg_scale,
                positive_kwargs=both | positive,
                negative_kwargs=both | negative if do_true_cfg else None,
                cfg_normalize=cfg_normalize,  # type: ignore[arg-type]
                output_slice=output_slice,
            )
            latents = self.scheduler_step_maybe_with_cfg(noise_pred, t, latents, do_true_cfg)
        return latents


def is_guided(scale: float, negative_prompt: str | list[str] | None, needs_negative_prompt: bool = True) -> bool:
    """Whether guidance is on; says once why, where it was asked for and is off.

    Args:
        needs_negative_prompt: without a negative prompt there is no guidance; if not, a missing one is an empty one.
    """
    if scale <= 1:
        if negative_prompt is not None:
            log_once(f"guidance is off: a negative prompt was given, but the guidance scale {scale:g} is not above 1")
        return False
    if negative_prompt is None and needs_negative_prompt:
        log_once(f"guidance is off: the scale is {scale:g}, but there is no negative prompt (an empty one is enough)")
        return False
    return True


def as_many(negative_prompt: str | list[str], prompt: str | list[str]) -> str | list[str]:
    """One negative prompt serves all prompts of a list."""
    if isinstance(negative_prompt, str) and isinstance(prompt, list):
        return [negative_prompt] * len(prompt)
    return negative_prompt
