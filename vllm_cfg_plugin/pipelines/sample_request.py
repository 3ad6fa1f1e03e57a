"""A request as a checkpoint's users would make it, for what is tried at start-up; must not import vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import msgspec
from msgspec import UNSET

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.params import DiffusionRequest, Guidance, ImageInput
from vllm_cfg_plugin.pipelines.base import EnginePipeline, PromptEmbeds

_BLANK = ImageInput("blank", "RGB", 64, 64, bytes(64 * 64 * 3))
_FEW_STEPS = 2
# Widths of prompt embeddings and of their summary, as diffusers' transformers name them.
_TEXT_WIDTHS = ("joint_attention_dim", "text_dim", "cap_feat_dim")
_POOLED_WIDTH = "pooled_projection_dim"


def sample_request(info: PipelineInfo, scale: float = 1.0, prompt: str = "a cat") -> DiffusionRequest:
    """A request for an image of the model's own size, its sides and frames scaled, with blank images if it must."""
    images = [_BLANK] * info.min_images
    sizes = [(image.width, image.height) for image in images]
    default = info.default_params
    sides = (default.height, default.width) if info.default_size is None else info.default_size(sizes)
    height, width = (max(1, round(cast(int, side) * scale / info.size_multiple)) * info.size_multiple for side in sides)
    if info.max_side:
        height, width = min(height, info.max_side), min(width, info.max_side)
    frames = _frames(info, scale)
    layers = 0 if default.layers is UNSET else default.layers
    steps = _FEW_STEPS if default.num_inference_steps is UNSET else default.num_inference_steps
    prompts, call = [prompt], None
    if info.call_arguments is not None:
        steps, scale_of_guidance = _FEW_STEPS, getattr(default, info.cfg_scale)
        prompts += [""] * (scale_of_guidance is not UNSET and scale_of_guidance > 1)
        extra = {"strength": 1.0} if "strength" in info.extra_fields else {}
        given = {"height": height, "width": width, "num_inference_steps": steps, "extra": extra}
        given |= {} if default.num_frames is UNSET else {"num_frames": frames}
        call = info.call_arguments(msgspec.structs.replace(default, **given))
    return DiffusionRequest(
        prompts=prompts,
        text_tokens=[len(text) for text in prompts],
        call=call,
        image_tokens=info.image_tokens(height, width, frames, layers),
        condition_tokens=info.tokens_of_images(sizes, height, width)[0],
        images=images,
        height=height,
        width=width,
        num_frames=frames,
        layers=layers,
        num_inference_steps=steps,
        num_timesteps=info.num_timesteps(steps),
        guidance=Guidance(distilled=1.0 if info.distilled_scale else None),
        seed=0,
    )


def sample_requests(info: PipelineInfo, scales: Iterable[float]) -> list[DiffusionRequest]:
    """Requests of growing size; scales that come to the same size give one."""
    requests = (sample_request(info, scale) for scale in scales)
    return list({request.image_tokens: request for request in requests}.values())


def blank_embeds(pipeline: EnginePipeline, tokens: int) -> PromptEmbeds:
    """Embeddings of the shape of a text's of so many tokens, where there is no text encoder to make any.

    Raises:
        LookupError: the transformer's configuration does not say how wide they are.
    """
    config: Any = pipeline.transformer.config
    width = next((config[name] for name in _TEXT_WIDTHS if name in config), 0)
    if not width:
        raise LookupError(f"the transformer's configuration has none of {', '.join(_TEXT_WIDTHS)}")
    weight = pipeline._weight
    pooled = weight.new_zeros(config[_POOLED_WIDTH]) if _POOLED_WIDTH in config else None
    return PromptEmbeds(weight.new_zeros(tokens, width), pooled)


def _frames(info: PipelineInfo, scale: float) -> int:
    """Frames of a video of about this share of the model's own length."""
    default = 1 if info.default_params.num_frames is UNSET else info.default_params.num_frames
    if default == 1 and info.min_images < 2:
        return 1
    # One latent frame alone is no video, and can't have a first and a last image.
    further = max(1, round((default - 1) * min(scale, 1) / info.frames_per_latent))
    return further * info.frames_per_latent + 1
