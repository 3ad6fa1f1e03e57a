"""Flux text-to-image, on diffusers' own methods.

Flux is guided by `true_cfg_scale` and a negative prompt; `guidance_scale` is an input of a distilled checkpoint. Only
the pooled embedding of CLIP is cut to its 77 tokens, as upstream cuts it. Must not import vLLM at module level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline as DiffusersFluxPipeline
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from msgspec import UNSET

from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo, TextRules
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, Guidance
from vllm_cfg_plugin.pipelines.base import BranchInput, PromptEmbeds
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.autoencoders import vae_scale_factor
from vllm_cfg_plugin.pipelines.common.flow_schedule import (
    dynamic_shift,
    set_flow_timesteps,
    set_shifted_timesteps,
)
from vllm_cfg_plugin.pipelines.common.generate import branch_texts, is_guided
from vllm_cfg_plugin.pipelines.common.image_pipeline import Asked
from vllm_cfg_plugin.pipelines.common.latent_tokens import PositionIdsPipeline
from vllm_cfg_plugin.pipelines.common.mmdit import LAYER_LISTS
from vllm_cfg_plugin.pipelines.flux.transformer import PackedFluxTransformer

MAX_TEXT_TOKENS = 512
DEFAULT_GUIDANCE_SCALE = 3.5


class FluxPipeline(PositionIdsPipeline, DiffusersFluxPipeline):
    """diffusers' FluxPipeline with CFG-Parallel, for the engine or to be called directly."""

    adopted: ClassVar[dict[str, Any]] = {"transformer": PackedFluxTransformer}
    layer_lists = LAYER_LISTS
    output_class = FluxPipelineOutput
    call_options: ClassVar[dict[str, Any]] = {"cfg_normalize": False}

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        scale = vae_scale_factor(checkpoint)
        is_distilled = checkpoint.component_config("transformer").get("guidance_embeds", False)
        return PipelineInfo(
            text=TextRules(MAX_TEXT_TOKENS, tokenizer="tokenizer_2", pads=True),
            size_multiple=2 * scale,
            pixels_per_token=2 * scale,
            cfg_scale="true_cfg_scale",
            options=frozenset({"max_sequence_length"}),
            distilled_scale="guidance_scale" if is_distilled else "",
            default_params=DiffusionParams(
                height=128 * scale,
                width=128 * scale,
                num_inference_steps=28,
                true_cfg_scale=1.0,
                max_sequence_length=MAX_TEXT_TOKENS,
                guidance_scale=DEFAULT_GUIDANCE_SCALE if is_distilled else UNSET,
            ),
        )

    def _asked(self, call: CallArguments) -> Asked:
        (height, width), most = self._size(call), call.max_sequence_length
        self.check_inputs(call.prompt, None, height, width, call.negative_prompt, max_sequence_length=most)
        guided = is_guided(call.true_cfg_scale, call.negative_prompt)
        return branch_texts(call.prompt, call.negative_prompt if guided else None), {
            "height": height,
            "width": width,
            "guidance": Guidance(
                scale=call.true_cfg_scale, distilled=call.guidance_scale, normalize=call.cfg_normalize
            ),
            "max_sequence_length": most,
        }

    @torch.no_grad()
    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        embeds, pooled, _ = self.encode_prompt(
            request.prompts[branch],
            device=self._weight.device,
            max_sequence_length=request.max_sequence_length or MAX_TEXT_TOKENS,
        )
        return PromptEmbeds(embeds[0], pooled[0])

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        return super().pack_branches(branches) | {
            "pooled_projections": torch.stack([own.embeds.pooled for own in branches if own.embeds.pooled is not None]),
            "guidance": self._guidance([own.request.guidance.distilled or 0.0 for own in branches]),
        }

    def _guidance(self, scales: Sequence[float]) -> torch.Tensor | None:
        """The input of a distilled transformer, [branches]; None for others."""
        if not self.transformer.config.guidance_embeds:
            return None
        return torch.tensor(scales, dtype=torch.float32)  # on the CPU, as the timesteps are

    @staticmethod
    def set_timesteps(scheduler: Any, num_inference_steps: int, image_tokens: int, device: torch.device) -> None:
        if scheduler.config.get("use_flow_sigmas"):  # the noise scheduler's own
            shift = dynamic_shift(scheduler.config, image_tokens, max_shift=1.15)
            set_shifted_timesteps(scheduler, num_inference_steps, None, shift, device)
        else:
            set_flow_timesteps(scheduler, num_inference_steps, image_tokens, device)

    def _image_ids(self, branch: BranchInput) -> torch.Tensor:
        grid = self._grid(branch.request.height, branch.request.width)
        return self._kept_ids(
            grid, lambda: self._prepare_latent_image_ids(1, *grid, torch.device("cpu"), torch.float32)
        )

    def _text_ids(self, tokens: int) -> torch.Tensor:
        return self._kept_ids(tokens, lambda: torch.zeros(tokens, 3))
