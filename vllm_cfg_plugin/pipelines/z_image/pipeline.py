"""Z-Image text-to-image, on diffusers' own methods.

The scale s of `neg + s * (pos - neg)` is diffusers' `guidance_scale` plus one here: its pipeline writes
`pos + guidance_scale * (pos - neg)`, and guidance is on above 0. Must not import vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.pipelines.z_image.pipeline_output import ZImagePipelineOutput
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline as DiffusersZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from vllm_cfg_plugin import guidance
from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo, TextRules
from vllm_cfg_plugin.distributed.cfg_parallel import log_once
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, Guidance
from vllm_cfg_plugin.pipelines.base import BranchInput, PromptEmbeds, joint_timesteps_ahead
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.autoencoders import decode_scaled, vae_scale_factor
from vllm_cfg_plugin.pipelines.common.flow_schedule import dynamic_shift, set_shifted_timesteps
from vllm_cfg_plugin.pipelines.common.generate import branch_texts
from vllm_cfg_plugin.pipelines.common.image_pipeline import Asked, ImagePipeline
from vllm_cfg_plugin.pipelines.z_image.transformer import FRAMES_PATCH, PATCH, PackedZImageTransformer

DEFAULT_TEXT_TOKENS = 512
PROMPT_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # the tokenizer's chat template writes it


class ZImagePipeline(ImagePipeline, DiffusersZImagePipeline):
    """diffusers' ZImagePipeline with CFG-Parallel, for the engine or to be called directly."""

    adopted: ClassVar[dict[str, Any]] = {"transformer": PackedZImageTransformer}
    layer_lists: ClassVar[dict[str, Any]] = {
        "noise_refiner": ("adaLN_modulation",),
        "context_refiner": (),
        "layers": ("adaLN_modulation",),
    }
    output_class = ZImagePipelineOutput
    heads_field = "n_heads"

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        token_side = PATCH * vae_scale_factor(checkpoint)
        text_positions, *positions = checkpoint.component_config("transformer").get("axes_lens", (1024, 512, 512))
        # The text's pad tokens have positions too, from 1 on, and the image has the next one.
        max_tokens = (text_positions - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF
        return PipelineInfo(
            text=TextRules(max_tokens, PROMPT_TEMPLATE),
            options=frozenset({"max_sequence_length"}),
            size_multiple=token_side,
            pixels_per_token=token_side,
            max_side=min(positions) * token_side,
            cfg_scale="guidance_scale",
            cfg_scale_offset=1.0,
            needs_negative_prompt=False,
            default_params=DiffusionParams(
                height=1024,
                width=1024,
                num_inference_steps=50,
                guidance_scale=5.0,
                cfg_normalize=False,
                max_sequence_length=min(DEFAULT_TEXT_TOKENS, max_tokens),
            ),
        )

    def _asked(self, call: CallArguments) -> Asked:
        height, width = self._checked_side("height", call.height), self._checked_side("width", call.width)
        scale, negative_prompt = call.guidance_scale, call.negative_prompt
        if negative_prompt is not None and scale <= 0:
            log_once(f"guidance is off: a negative prompt was given, but guidance_scale={scale:g} is not > 0")
        limit = 1.0 if call.cfg_truncation is None else call.cfg_truncation
        interval = (0.0, self._guided_share(call.num_inference_steps, height, width, limit))
        return branch_texts(call.prompt, (negative_prompt or "") if scale > 0 else None), {
            "height": height,
            "width": width,
            "guidance": Guidance(scale=1 + scale, normalize=call.cfg_normalization, interval=interval),
            "max_sequence_length": call.max_sequence_length,
        }

    def predict_noise(self, **kwargs: Any) -> torch.Tensor:
        """The noise scheduler goes from the image to the noise, the transformer the other way."""
        return -super().predict_noise(**kwargs).float()

    def cfg_normalize_function(
        self, noise_pred: torch.Tensor, comb_pred: torch.Tensor, most: float = 1.0
    ) -> torch.Tensor:
        """Cut the combined prediction to `most` times the positive one's norm: diffusers' `cfg_normalization`."""
        return guidance.limit_to_norm(noise_pred, comb_pred, most)

    @torch.no_grad()
    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        most = request.max_sequence_length or DEFAULT_TEXT_TOKENS
        return PromptEmbeds(self._encode_text(request.prompts[branch], self._weight.device, most))

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        ahead = joint_timesteps_ahead(branches)
        images = [branch.latents.transpose(0, 1).to(self._weight.dtype) for branch in branches]
        patches = [self.transformer._patchify_image(image, PATCH, FRAMES_PATCH)[0] for image in images]
        return {
            "x": torch.cat(patches)[None],
            "t": _image_time(torch.stack([branch.timestep for branch in branches])),
            "cap_feats": [branch.embeds.tokens for branch in branches],
            "grids": [(1, *self._grid(branch.request.height, branch.request.width)) for branch in branches],
            "timesteps_ahead": None if ahead is None else _image_time(ahead),
        }

    def unpack_predictions(self, prediction: torch.Tensor, branches: Sequence[BranchInput]) -> list[torch.Tensor]:
        sizes = [(1, *branch.latents.shape[-2:]) for branch in branches]
        patches = prediction[0].split([branch.request.image_tokens for branch in branches])
        images = self.transformer.unpatchify(list(patches), sizes, PATCH, FRAMES_PATCH)
        return [image.transpose(0, 1) for image in images]

    def forget_derived(self) -> None:
        self.transformer.modulations.clear()

    @property
    def prediction_like(self) -> torch.Tensor:
        return self._weight.new_empty(0, dtype=torch.float32)  # see `predict_noise`

    def prediction_shape(self, request: DiffusionRequest) -> tuple[int, ...]:
        factor = self.vae_scale_factor
        return self.transformer.in_channels, request.height // factor, request.width // factor

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

    @staticmethod
    def set_timesteps(scheduler: Any, num_inference_steps: int, image_tokens: int, device: torch.device) -> None:
        sigmas = get_default_z_image_sigmas(num_inference_steps)
        shift = dynamic_shift(scheduler.config, image_tokens, max_shift=1.15)
        set_shifted_timesteps(scheduler, num_inference_steps, sigmas, shift, device)

    def _decode_latents(self, latents: torch.Tensor, request: DiffusionRequest) -> torch.Tensor:
        return decode_scaled(self.vae, latents.to(self.vae.dtype))

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        side = PATCH * self.vae_scale_factor
        return height // side, width // side

    def _guided_share(self, num_inference_steps: int, height: int, width: int, cfg_truncation: float) -> float:
        """The share of the steps that are guided: until this share of the noise is gone."""
        rows, columns = self._grid(height, width)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        self.set_timesteps(scheduler, num_inference_steps, rows * columns, torch.device("cpu"))
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
