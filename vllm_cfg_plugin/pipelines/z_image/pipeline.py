"""Z-Image text-to-image, on diffusers' own methods.

The scale s of `neg + s * (pos - neg)` is diffusers' `guidance_scale` plus one here: its pipeline writes
`pos + guidance_scale * (pos - neg)`, and guidance is on above 0. Must not import vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_output import ZImagePipelineOutput
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline as DiffusersZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from transformers import AutoTokenizer, PreTrainedModel

from vllm_cfg_plugin import guidance
from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo, TextRules
from vllm_cfg_plugin.distributed.cfg_parallel import log_once
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, Guidance
from vllm_cfg_plugin.pipelines.base import BranchInput, PromptEmbeds, joint_timesteps_ahead
from vllm_cfg_plugin.pipelines.common.autoencoders import decode_scaled, vae_scale_factor
from vllm_cfg_plugin.pipelines.common.flow_schedule import dynamic_shift, set_shifted_timesteps
from vllm_cfg_plugin.pipelines.common.generate import Generators, branch_texts
from vllm_cfg_plugin.pipelines.common.image_pipeline import ImagePipeline
from vllm_cfg_plugin.pipelines.z_image.transformer import FRAMES_PATCH, PATCH, PackedZImageTransformer

MAX_TEXT_TOKENS = 512
PROMPT_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # the tokenizer's chat template writes it


class ZImagePipeline(ImagePipeline, DiffusersZImagePipeline):
    """diffusers' ZImagePipeline with CFG-Parallel, for the engine or to be called directly."""

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        token_side = PATCH * vae_scale_factor(checkpoint)
        _, *positions = checkpoint.component_config("transformer").get("axes_lens", (1024, 512, 512))
        return PipelineInfo(
            text=TextRules(MAX_TEXT_TOKENS, PROMPT_TEMPLATE),
            size_multiple=token_side,
            pixels_per_token=token_side,
            max_side=min(positions) * token_side,
            min_steps=1,
            cfg_scale="guidance_scale",
            cfg_scale_offset=1.0,
            needs_negative_prompt=False,
            default_params=DiffusionParams(
                height=1024, width=1024, num_inference_steps=50, guidance_scale=5.0, cfg_normalize=False
            ),
        )

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: AutoTokenizer,
        transformer: ZImageTransformer2DModel,
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, PackedZImageTransformer.adopt(transformer))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        cfg_normalization: bool | float = False,
        cfg_truncation: float | None = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        max_sequence_length: int = MAX_TEXT_TOKENS,
    ) -> ZImagePipelineOutput | tuple[Any]:
        """Generate images; under `torchrun` every rank calls this alike and returns the same images.

        Args:
            height, width: pixels.
            guidance_scale: on above 0, as in diffusers' pipeline.
            cfg_normalization: see `combine_cfg_noise`.
            cfg_truncation: guidance is on until this share of the noise is gone; None: always.
            negative_prompt: None is an empty one.
            generator, latents: source of the first latents, or these themselves, [count, channels, height, width].
            output_type: "pil", "np", "pt" or "latent".

        Raises:
            InvalidRequestError: the size is not one of whole tokens.
        """
        height, width = self._checked_side("height", height), self._checked_side("width", width)
        guided = guidance_scale > 0
        if negative_prompt is not None and not guided:
            log_once(f"guidance is off: a negative prompt was given, but guidance_scale={guidance_scale:g} is not > 0")
        limit = 1.0 if cfg_truncation is None else cfg_truncation
        share = self._guided_share(num_inference_steps, height, width, limit)
        images = self._generate(
            branch_texts(prompt, (negative_prompt or "") if guided else None),
            num_images_per_prompt,
            generator,
            latents,
            output_type,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance=Guidance(scale=1 + guidance_scale, normalize=cfg_normalization, interval=(0.0, share)),
            max_sequence_length=max_sequence_length,
        )
        return ZImagePipelineOutput(images=images) if return_dict else (images,)

    def predict_noise(self, **kwargs: Any) -> torch.Tensor:
        """The noise scheduler goes from the image to the noise, the transformer the other way."""
        return -super().predict_noise(**kwargs).float()

    def combine_cfg_noise(
        self,
        noise_pred: torch.Tensor,
        neg_noise_pred: torch.Tensor,
        true_cfg_scale: float,
        cfg_normalize: bool | float = False,
    ) -> torch.Tensor:
        """As the mixin's, with `cfg_normalize` as diffusers' `cfg_normalization`.

        Args:
            cfg_normalize: the norm of the guided prediction is at most so many times the positive one's; False or 0 is
                no limit, True is 1.
        """
        combined = guidance.classifier_free_guidance(noise_pred, neg_noise_pred, true_cfg_scale)
        return self.cfg_normalize_function(noise_pred, combined, float(cfg_normalize)) if cfg_normalize else combined

    def cfg_normalize_function(
        self, noise_pred: torch.Tensor, comb_pred: torch.Tensor, most: float = 1.0
    ) -> torch.Tensor:
        """Cut the combined prediction to `most` times the positive one's norm."""
        return guidance.limit_to_norm(noise_pred, comb_pred, most)

    @torch.no_grad()
    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        most = request.max_sequence_length or MAX_TEXT_TOKENS
        return PromptEmbeds(self._encode_text(request.prompts[branch], self._weight.device, most))

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        ahead = joint_timesteps_ahead(branches)
        return {
            "x": torch.cat([branch.latents for branch in branches], dim=1).to(self._weight.dtype),
            "t": _image_time(torch.stack([branch.timestep for branch in branches])),
            "cap_feats": [branch.embeds.tokens for branch in branches],
            "grids": [(1, *self._grid(branch.request.height, branch.request.width)) for branch in branches],
            "timesteps_ahead": None if ahead is None else _image_time(ahead),
        }

    def unpack_predictions(self, prediction: torch.Tensor, branches: Sequence[BranchInput]) -> list[torch.Tensor]:
        return list(prediction.split([branch.latents.shape[1] for branch in branches], dim=1))

    def forget_derived(self) -> None:
        self.transformer.modulations.clear()

    @property
    def prediction_like(self) -> torch.Tensor:
        return self._weight.new_empty(0, dtype=torch.float32)  # see `predict_noise`

    def prediction_shape(self, request: DiffusionRequest) -> tuple[int, ...]:
        return request.image_tokens, PATCH * PATCH * FRAMES_PATCH * self.transformer.in_channels

    @property
    def _latent_channels(self) -> int:
        return self.transformer.in_channels

    def _encode_text(self, text: str, device: torch.device, max_length: int) -> torch.Tensor:
        """[text tokens, dim]; diffusers pads to `max_length`, which nothing reads, as the encoder is causal."""
        wrapped = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        tokens = self.tokenizer(wrapped, max_length=max_length, truncation=True, return_tensors="pt").to(device)
        encoded = self.text_encoder(tokens.input_ids, tokens.attention_mask.bool(), output_hidden_states=True)
        embeds: torch.Tensor = encoded.hidden_states[-2][0]
        return embeds

    def _prepare_noise(
        self,
        count: int,
        height: int,
        width: int,
        like: torch.Tensor,
        generator: Generators,
        latents: torch.Tensor | None = None,
        layers: int = 0,
    ) -> torch.Tensor:
        """First latents, [count, image tokens, patch], in float32 whatever the transformer's dtype."""
        in_float32 = like.new_empty(0, dtype=torch.float32)
        noise = super()._prepare_noise(count, height, width, in_float32, generator, latents, layers)
        images = [self.transformer._patchify_image(image, PATCH, FRAMES_PATCH)[0] for image in noise.unsqueeze(2)]
        return torch.stack(images)

    def _from_patches(self, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[batch, channels, latent height, latent width] of [batch, image tokens, patch]."""
        size = (1, height // self.vae_scale_factor, width // self.vae_scale_factor)
        count = patches.shape[0]
        images = self.transformer.unpatchify(list(patches.unbind()), [size] * count, PATCH, FRAMES_PATCH)
        return torch.stack(images).squeeze(2)

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, image_tokens: int, device: torch.device) -> None:
        sigmas = np.asarray(get_default_z_image_sigmas(num_inference_steps))
        set_shifted_timesteps(scheduler, sigmas, dynamic_shift(scheduler.config, image_tokens, max_shift=1.15), device)

    def _decode_latents(self, latents: torch.Tensor, height: int, width: int, layers: int = 0) -> torch.Tensor:
        return decode_scaled(self.vae, self._from_patches(latents, height, width).to(self.vae.dtype))

    def _finish(self, latents: torch.Tensor, height: int, width: int, output_type: str, layers: int = 0) -> Any:
        if output_type == "latent":
            return self._from_patches(latents, height, width)
        return super()._finish(latents, height, width, output_type, layers)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        side = PATCH * self.vae_scale_factor
        return height // side, width // side

    def _guided_share(self, num_inference_steps: int, height: int, width: int, cfg_truncation: float) -> float:
        """The share of the steps that are guided: until this share of the noise is gone."""
        rows, columns = self._grid(height, width)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        self._set_timesteps(scheduler, num_inference_steps, rows * columns, torch.device("cpu"))
        guided = int((_image_time(scheduler.timesteps) <= cfg_truncation).sum())
        # Half a step more, so that rounding can't take one away.
        return min((guided + 0.5) / len(scheduler.timesteps), 1.0)

    def _checked_side(self, name: str, pixels: int | None) -> int:
        side = PATCH * self.vae_scale_factor
        if pixels is not None and pixels % side:
            raise InvalidRequestError(name, pixels, f"a positive multiple of {side}")
        return pixels or 1024


def _image_time(timesteps: torch.Tensor) -> torch.Tensor:
    """The transformer's time, 0 is noise and 1 the image, of the noise scheduler's timesteps."""
    return (1000 - timesteps) / 1000
