"""The CFG-Parallel denoising loop of the Qwen-Image pipelines; must not import vLLM at module level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_cfg_plugin.distributed.cfg_parallel import CFGParallelMixin


class QwenImageCFGParallelMixin(CFGParallelMixin):
    """A denoising loop for pipelines of one's own on Qwen-Image's transformer, on one rank or many."""

    def diffuse(
        self,
        prompt_embeds: torch.Tensor,
        prompt_embeds_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds_mask: torch.Tensor | None,
        latents: torch.Tensor,
        img_shapes: Sequence[Any],
        txt_seq_lens: Sequence[int] | None,
        negative_txt_seq_lens: Sequence[int] | None,
        timesteps: torch.Tensor,
        do_true_cfg: bool,
        guidance: torch.Tensor | None,
        true_cfg_scale: float,
        cfg_normalize: bool = True,
        image_latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Denoise a batch through all timesteps; every rank returns the same latents.

        Args:
            prompt_embeds, negative_prompt_embeds: [batch, text tokens, dim]; the negative ones only where
                `do_true_cfg`.
            prompt_embeds_mask, negative_prompt_embeds_mask: [batch, text tokens], ones then zeros; None for all ones.
            latents: [batch, image tokens, channels].
            img_shapes: (frames, height, width) in tokens of each batch element's images.
            txt_seq_lens, negative_txt_seq_lens: text tokens of each batch element.
            timesteps: the noise scheduler's.
            image_latents: of the images that are the condition, [batch, their tokens, channels]; None without any.
        """
        condition = [] if image_latents is None else [image_latents]
        for t in timesteps:
            shared = {
                "hidden_states": torch.cat([latents, *condition], dim=1),
                "timestep": t.expand(latents.shape[0]).to(latents.device, latents.dtype) / 1000,
                "guidance": guidance,
                "img_shapes": img_shapes,
            }
            positive = {
                "encoder_hidden_states": prompt_embeds,
                "encoder_hidden_states_mask": prompt_embeds_mask,
                "txt_seq_lens": txt_seq_lens,
            }
            negative = {
                "encoder_hidden_states": negative_prompt_embeds,
                "encoder_hidden_states_mask": negative_prompt_embeds_mask,
                "txt_seq_lens": negative_txt_seq_lens,
            }
            noise_pred = self.predict_noise_maybe_with_cfg(
                do_true_cfg=do_true_cfg,
                true_cfg_scale=true_cfg_scale,
                positive_kwargs=shared | positive,
                negative_kwargs=shared | negative if do_true_cfg else None,
                cfg_normalize=cfg_normalize,
                output_slice=latents.shape[1] if condition else None,
            )
            latents = self.scheduler_step_maybe_with_cfg(noise_pred, t, latents, do_true_cfg)
        return latents
