"""Stable Diffusion 3 text-to-image, on diffusers' own methods.

Only the embeddings of the two CLIP encoders are cut to their 77 tokens, as upstream cuts them. Must not import vLLM at
module level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline as DiffusersStableDiffusion3Pipeline,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import retrieve_timesteps

from vllm_cfg_plugin.checkpoint import MODEL_INDEX, Checkpoint, PipelineInfo, TextRules
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, Guidance
from vllm_cfg_plugin.pipelines.base import BranchInput, PromptEmbeds, begin
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.autoencoders import decode_scaled, vae_scale_factor
from vllm_cfg_plugin.pipelines.common.flow_schedule import dynamic_shift
from vllm_cfg_plugin.pipelines.common.generate import branch_texts, is_guided
from vllm_cfg_plugin.pipelines.common.image_pipeline import Asked, ImagePipeline
from vllm_cfg_plugin.pipelines.common.mmdit import LAYER_LISTS
from vllm_cfg_plugin.pipelines.sd3.transformer import PackedSD3Transformer, patchify, unpatchify

DEFAULT_T5_TOKENS, MAX_T5_TOKENS = 256, 512
CLIP_TOKENS = 77


class StableDiffusion3Pipeline(ImagePipeline, DiffusersStableDiffusion3Pipeline):
    """diffusers' StableDiffusion3Pipeline with CFG-Parallel, for the engine or to be called directly."""

    channel_dim: ClassVar[int] = 1
    adopted: ClassVar[dict[str, Any]] = {"transformer": PackedSD3Transformer}
    layer_lists = LAYER_LISTS
    output_class = StableDiffusion3PipelineOutput
    call_options: ClassVar[dict[str, Any]] = {"cfg_normalize": False}

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        scale, transformer = vae_scale_factor(checkpoint), checkpoint.component_config("transformer")
        token_side = scale * transformer.get("patch_size", 2)
        side = scale * transformer.get("sample_size", 128)
        text = TextRules(MAX_T5_TOKENS, tokenizer="tokenizer_3", pads=True, extra_tokens=CLIP_TOKENS)
        options = frozenset({"max_sequence_length"})
        default_tokens: dict[str, Any] = {"max_sequence_length": DEFAULT_T5_TOKENS}
        if not _has_t5(checkpoint):  # its largest encoder: without it the model sees no more of a text than CLIP does
            text = TextRules(CLIP_TOKENS, pads=True, extra_tokens=DEFAULT_T5_TOKENS)
            options, default_tokens = frozenset(), {}
        return PipelineInfo(
            text=text,
            options=options,
            size_multiple=token_side,
            pixels_per_token=token_side,
            max_side=token_side * transformer.get("pos_embed_max_size", 96),
            cfg_scale="guidance_scale",
            needs_negative_prompt=False,
            default_params=DiffusionParams(
                height=side, width=side, num_inference_steps=28, guidance_scale=7.0, **default_tokens
            ),
        )

    @classmethod
    def load(
        cls, model: str, *, dtype: torch.dtype, device: torch.device, revision: str | None = None, **components: Any
    ) -> Self:
        if not _has_t5(Checkpoint(model, revision)):
            components = {"text_encoder_3": None, "tokenizer_3": None} | components
        return super().load(model, dtype=dtype, device=device, revision=revision, **components)

    def _asked(self, call: CallArguments) -> Asked:
        (height, width), most = self._size(call), call.max_sequence_length
        self.check_inputs(call.prompt, None, None, height, width, max_sequence_length=most)
        guided = is_guided(call.guidance_scale, call.negative_prompt, needs_negative_prompt=False)
        return branch_texts(call.prompt, (call.negative_prompt or "") if guided else None), {
            "height": height,
            "width": width,
            "guidance": Guidance(scale=call.guidance_scale, normalize=call.cfg_normalize),
            "max_sequence_length": most,
        }

    @torch.no_grad()
    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        text = request.prompts[branch]
        embeds, _, pooled, _ = self.encode_prompt(
            text,
            text,
            text,
            device=self._weight.device,
            do_classifier_free_guidance=False,
            max_sequence_length=request.max_sequence_length or DEFAULT_T5_TOKENS,
        )
        return PromptEmbeds(embeds[0], pooled[0])

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        return {
            "hidden_states": torch.cat([patchify(own.latents, self.patch_size) for own in branches], dim=1),
            "timestep": torch.stack([own.timestep for own in branches]),
            "encoder_hidden_states": torch.cat([own.embeds.tokens for own in branches])[None],
            "pooled_projections": torch.stack([own.embeds.pooled for own in branches if own.embeds.pooled is not None]),
            "img_shapes": [self._grid(own.request.height, own.request.width) for own in branches],
            "txt_seq_lens": [own.embeds.tokens.shape[0] for own in branches],
        }

    def unpack_predictions(self, prediction: torch.Tensor, branches: Sequence[BranchInput]) -> list[torch.Tensor]:
        grids = [self._grid(own.request.height, own.request.width) for own in branches]
        sequences = prediction.split([rows * columns for rows, columns in grids], dim=1)
        return [unpatchify(tokens, grid, self.patch_size) for tokens, grid in zip(sequences, grids, strict=True)]

    def prediction_shape(self, request: DiffusionRequest) -> tuple[int, ...]:
        scale = self.vae_scale_factor
        return self.transformer.config.in_channels, request.height // scale, request.width // scale

    @property
    def _latent_channels(self) -> int:
        return self.transformer.config.in_channels

    @staticmethod
    def set_timesteps(scheduler: Any, num_inference_steps: int, image_tokens: int, device: torch.device) -> None:
        shift: dict[str, Any] = {}
        if scheduler.config.get("use_dynamic_shifting"):
            shift["mu"] = dynamic_shift(scheduler.config, image_tokens, max_shift=1.16)
        retrieve_timesteps(scheduler, num_inference_steps, device, **shift)
        begin(scheduler)

    def _decode_latents(self, latents: torch.Tensor, request: DiffusionRequest) -> torch.Tensor:
        return decode_scaled(self.vae, latents)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        side = self.vae_scale_factor * self.patch_size
        return height // side, width // side


def _has_t5(checkpoint: Checkpoint) -> bool:
    """Whether the largest text encoder is there: it is left out to save memory."""
    index = checkpoint.read_json(MODEL_INDEX) or {}
    return index.get("text_encoder_3", (None,))[0] is not None
