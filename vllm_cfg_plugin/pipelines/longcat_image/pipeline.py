"""LongCat-Image text-to-image, on diffusers' own methods.

Two things differ from upstream by intent: prompts are rewritten by the language model only where a direct call asks for
it, as that is sampled text and no part of the request, and so the engine does not load the `text_processor` for it.
Must not import vLLM at module level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image
from diffusers.pipelines.longcat_image.pipeline_longcat_image import (
    LongCatImagePipeline as DiffusersLongCatImagePipeline,
)
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids
from diffusers.pipelines.longcat_image.pipeline_output import LongCatImagePipelineOutput

from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo, TextRules
from vllm_cfg_plugin.compat.libraries import split_contractions_alike
from vllm_cfg_plugin.distributed.cfg_parallel import same_on_all_ranks
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, Guidance
from vllm_cfg_plugin.pipelines.base import BranchInput, PromptEmbeds
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.autoencoders import vae_scale_factor
from vllm_cfg_plugin.pipelines.common.generate import branch_texts, is_guided
from vllm_cfg_plugin.pipelines.common.image_pipeline import Asked
from vllm_cfg_plugin.pipelines.common.latent_tokens import PositionIdsPipeline
from vllm_cfg_plugin.pipelines.common.mmdit import LAYER_LISTS
from vllm_cfg_plugin.pipelines.common.vision_processor import PLACEHOLDERS
from vllm_cfg_plugin.pipelines.longcat_image.transformer import PackedLongCatImageTransformer

split_contractions_alike()

MAX_TEXT_TOKENS = 512  # `tokenizer_max_length` of diffusers' `__init__`: every text is padded to it
LATENT_CHANNELS = 16  # of diffusers' `__call__`
DEFAULT_GUIDANCE_SCALE = 4.5
NEW_IMAGE, CONDITION = 1, 2  # first axis of the position ids


class LongCatImageBase(PositionIdsPipeline):
    """What text-to-image and editing have in common."""

    adopted: ClassVar[dict[str, Any]] = {"transformer": PackedLongCatImageTransformer}
    layer_lists = LAYER_LISTS
    output_class = LongCatImagePipelineOutput

    def cfg_normalize_function(
        self, noise_pred: torch.Tensor, comb_pred: torch.Tensor, cfg_renorm_min: float = 0.0
    ) -> torch.Tensor:
        """Shorten the combined prediction to the positive one's norm, token by token, but never lengthen it.

        Args:
            cfg_renorm_min: the least factor.
        """
        cond_norm: torch.Tensor = torch.norm(noise_pred, dim=-1, keepdim=True)
        noise_norm: torch.Tensor = torch.norm(comb_pred, dim=-1, keepdim=True)
        scale = (cond_norm / (noise_norm + 1e-8)).clamp(min=cfg_renorm_min, max=1.0)
        return comb_pred * scale

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        return super().pack_branches(branches) | {"timesteps_ahead": self._times_ahead(branches)}

    def forget_derived(self) -> None:
        self.transformer.modulations.clear()

    @property
    def _latent_channels(self) -> int:
        return LATENT_CHANNELS

    def _text_ids(self, tokens: int) -> torch.Tensor:
        return self._kept_ids(
            tokens, lambda: prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=tokens)
        )


class LongCatImagePipeline(LongCatImageBase, DiffusersLongCatImagePipeline):
    """diffusers' LongCatImagePipeline with CFG-Parallel, for the engine or to be called directly."""

    # diffusers rewrites prompts by default.
    call_options: ClassVar[dict[str, Any]] = {"enable_prompt_rewrite": False}

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        return describe_longcat_image(checkpoint, cfg_normalize=True)

    @classmethod
    def load(
        cls, model: str, *, dtype: torch.dtype, device: torch.device, revision: str | None = None, **components: Any
    ) -> Self:
        components = {"text_processor": None} | components
        return super().load(model, dtype=dtype, device=device, revision=revision, **components)

    def _asked(self, call: CallArguments) -> Asked:
        height, width = self._size(call)
        self.check_inputs(call.prompt, height, width, call.negative_prompt)
        prompt = self._rewritten(call.prompt) if call.enable_prompt_rewrite else call.prompt
        normalize = call.enable_cfg_renorm and (call.cfg_renorm_min or True)
        return guided_texts(call, prompt), {
            "height": height,
            "width": width,
            "guidance": Guidance(scale=call.guidance_scale, normalize=normalize),
        }

    @torch.no_grad()
    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        return PromptEmbeds(self.encode_prompt(request.prompts[branch])[0][0])

    def _rewritten(self, prompt: str | list[str]) -> list[str]:
        if self.text_processor is None:
            raise ConfigurationError(
                "enable_prompt_rewrite=True needs the checkpoint's text_processor, which this pipeline was loaded "
                "without: load it with from_pretrained"
            )
        return same_on_all_ranks(self.rewire_prompt(prompt, self._weight.device))  # sampled text

    def _image_ids(self, branch: BranchInput) -> torch.Tensor:
        grid = self._grid(branch.request.height, branch.request.width)
        return self._kept_ids(grid, lambda: image_ids(NEW_IMAGE, MAX_TEXT_TOKENS, *grid))


def describe_longcat_image(
    checkpoint: Checkpoint, cfg_normalize: bool, sees_images: bool = False, **more: Any
) -> PipelineInfo:
    """What text-to-image and editing have in common, and `more`."""
    scale = vae_scale_factor(checkpoint)
    return PipelineInfo(
        text=TextRules(
            MAX_TEXT_TOKENS,
            pieces=_text_pieces,
            pads=True,
            sees_images=sees_images,
            reserved=PLACEHOLDERS if sees_images else (),
        ),
        size_multiple=2 * scale,
        pixels_per_token=2 * scale,
        cfg_scale="guidance_scale",
        needs_negative_prompt=False,
        default_params=DiffusionParams(
            height=128 * scale,
            width=128 * scale,
            num_inference_steps=50,
            guidance_scale=DEFAULT_GUIDANCE_SCALE,
            cfg_normalize=cfg_normalize,
        ),
        **more,
    )


def guided_texts(call: CallArguments, prompt: str | list[str]) -> list[list[str]]:
    """The texts of the branches; a missing negative prompt is an empty one."""
    guided = is_guided(call.guidance_scale, call.negative_prompt, needs_negative_prompt=False)
    return branch_texts(prompt, (call.negative_prompt or "") if guided else None)


def _text_pieces(prompt: str) -> list[str]:
    """What the tokenizer is given of a prompt, piece by piece: quoted text is spelled letter by letter."""
    pieces: list[str] = []
    for text, is_quoted in pipeline_longcat_image.split_quotation(prompt):
        pieces.extend(text if is_quoted else [text])
    return pieces


def image_ids(modality: int, text_tokens: int, height: int, width: int) -> torch.Tensor:
    """Position ids of an image of so many tokens each way, which count on from the text's, [tokens, 3]."""
    start = (text_tokens, text_tokens)
    ids: torch.Tensor = prepare_pos_ids(modality_id=modality, type="image", start=start, height=height, width=width)
    return ids
