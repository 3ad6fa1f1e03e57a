"""AuraFlow with CFG-Parallel: the sample of docs/adding_a_pipeline.md, a whole family in one file.

It forwards its branches one after the other, by diffusers' own transformer: nothing here is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from diffusers import AuraFlowPipeline as DiffusersAuraFlowPipeline
from diffusers import ImagePipelineOutput

from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo, TextRules
from vllm_cfg_plugin.distributed.cfg_parallel import CFGParallelMixin, same_on_all_ranks
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline, PromptEmbeds, to_uint8

TEXT_TOKENS = 256  # every text is padded to so many


class AuraFlowCFGParallelMixin(CFGParallelMixin):
    """The denoising loop, on one rank or two."""

    channel_dim = -3  # predictions are [batch, channels, height, width]

    def diffuse(
        self,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        do_true_cfg: bool,
        true_cfg_scale: float,
    ) -> torch.Tensor:
        """Denoise latents [batch, channels, height, width]; every rank returns the same.

        Args:
            prompt_embeds, negative_prompt_embeds: [batch, TEXT_TOKENS, dim]; the negative ones only where
                `do_true_cfg`.
            timesteps: the noise scheduler's.
        """
        for t in timesteps:
            shared = {"hidden_states": latents, "timestep": (t / 1000).expand(latents.shape[0]).to(latents)}
            positive_kwargs = shared | {"encoder_hidden_states": prompt_embeds}
            negative_kwargs = shared | {"encoder_hidden_states": negative_prompt_embeds}
            noise_pred = self.predict_noise_maybe_with_cfg(
                do_true_cfg=do_true_cfg,
                true_cfg_scale=true_cfg_scale,
                positive_kwargs=positive_kwargs,
                negative_kwargs=negative_kwargs if do_true_cfg else None,
                cfg_normalize=False,
            )
            latents = self.scheduler_step_maybe_with_cfg(noise_pred, t, latents, do_true_cfg)
        return latents


class AuraFlowPipeline(AuraFlowCFGParallelMixin, EnginePipeline, DiffusersAuraFlowPipeline):
    """diffusers' AuraFlowPipeline with CFG-Parallel, to be called directly or run by the engine."""

    # ---- to be called directly ----

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        guidance_scale: float = 3.5,
        num_inference_steps: int = 50,
        height: int = 1024,
        width: int = 1024,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image; under `torchrun` every rank calls this alike. A missing negative prompt is an empty one."""
        do_true_cfg = guidance_scale > 1
        negative_embeds = self._encode(negative_prompt or "") if do_true_cfg else None
        noise = self._draw_noise(height, width, generator)
        self.scheduler.set_timesteps(num_inference_steps, device=noise.device)
        self.scheduler.set_begin_index(0)
        latents = self.diffuse(
            prompt_embeds=self._encode(prompt),
            negative_prompt_embeds=negative_embeds,
            latents=same_on_all_ranks(noise),
            timesteps=self.scheduler.timesteps,
            do_true_cfg=do_true_cfg,
            true_cfg_scale=guidance_scale,
        )
        images: Any = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self._decode_latents(latents), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _encode(self, text: str) -> torch.Tensor:
        """[1, TEXT_TOKENS, dim]"""
        embeds, *_ = self.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)
        return embeds

    def _draw_noise(self, height: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
        """[1, channels, height, width] in latent pixels."""
        weight = self.transformer.proj_out.weight
        channels = self.transformer.config.in_channels
        return self.prepare_latents(1, channels, height, width, weight.dtype, weight.device, generator)

    def _decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """[1, 3, height, width] in -1..1."""
        return self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]

    # ---- the engine's contract ----

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        transformer, vae = checkpoint.component_config("transformer"), checkpoint.component_config("vae")
        latent_pixel = 2 ** (len(vae["block_out_channels"]) - 1)
        token = latent_pixel * transformer["patch_size"]
        return PipelineInfo(
            text=TextRules(TEXT_TOKENS, pads=True),
            size_multiple=token,
            pixels_per_token=token,
            max_side=token * isqrt(transformer["pos_embed_max_size"]),  # its positions are learned
            cfg_scale="guidance_scale",
            needs_negative_prompt=False,
            default_params=DiffusionParams(
                height=1024, width=1024, num_inference_steps=50, guidance_scale=3.5, cfg_normalize=False
            ),
        )

    @torch.no_grad()
    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        return PromptEmbeds(self._encode(request.prompts[branch])[0])

    def draw_noise(self, request: DiffusionRequest, generator: torch.Generator) -> torch.Tensor:
        return self._draw_noise(request.height, request.width, generator)

    def make_noise_scheduler(self, request: DiffusionRequest) -> Any:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(request.num_inference_steps, device="cpu")
        scheduler.set_begin_index(0)
        return scheduler

    def forward_group(self, branch: BranchInput) -> object:
        return object()  # equal to nothing else: every branch has a forward of its own

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        (branch,) = branches
        return {
            "hidden_states": branch.latents,
            "timestep": (branch.timestep / 1000)[None].to(branch.latents),
            "encoder_hidden_states": branch.embeds.tokens[None],
        }

    def unpack_predictions(self, prediction: torch.Tensor, branches: Sequence[BranchInput]) -> list[torch.Tensor]:
        return [prediction]

    def prediction_shape(self, request: DiffusionRequest) -> tuple[int, ...]:
        channels, pixel = self.transformer.config.in_channels, self.vae_scale_factor
        return channels, request.height // pixel, request.width // pixel

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, request: DiffusionRequest, condition: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        return to_uint8(self.image_processor.postprocess(self._decode_latents(latents), output_type="pt"))
