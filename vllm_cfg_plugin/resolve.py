"""Validates what a user asks and decides what is left open: parameters in, one `DiffusionRequest` per result out.

Runs once for a request, in the front end; nothing invalid goes further. Must not import torch or vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from msgspec import UNSET

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.field_checks import (
    check_copies,
    check_images,
    check_known_fields,
    check_results,
    checked_cache,
    checked_extra,
    checked_frames,
    checked_guidance,
    checked_int,
    checked_prompt,
    checked_seed,
    checked_size,
    checked_text_limit,
)
from vllm_cfg_plugin.lora_field import checked_lora
from vllm_cfg_plugin.params import (
    MAX_IMAGES_PER_REQUEST,
    DiffusionParams,
    DiffusionRequest,
    Guidance,
    ImageInput,
    LoRA,
    RequestLimits,
)


def resolve_requests(
    prompt: object,
    params: DiffusionParams,
    info: PipelineInfo,
    limits: RequestLimits,
    count_tokens: Callable[[str], int],
    images: Sequence[ImageInput] = (),
    adapters: Mapping[str, LoRA] | None = None,
    max_adapters: int = 0,
) -> list[DiffusionRequest]:
    """Validate one prompt with its parameters; returns `params.n` requests.

    Args:
        count_tokens: number of sequence tokens that a prompt takes in the model.
        images: what the request brings along.
        adapters: that there are, by name; max_adapters: how many a request may carry.

    Raises:
        InvalidRequestError: naming the first wrong field, its value and what is allowed.
    """
    asked = params
    check_known_fields(asked, info)
    check_images(images, info, limits)
    params = _with_defaults(asked, info, images)
    limit = checked_text_limit(params, info)
    text = checked_prompt("prompt", prompt, info, limit, _counting_images(count_tokens, info, len(images)))
    if text[0] in info.text.captioned:  # of a length that is known too late to plan with
        text = text[0], info.text.sequence_tokens(limit, limit)
    height, width = checked_size(params, info, limits)
    num_frames = checked_frames(params, info, len(images))
    layers = 0 if params.layers is UNSET else checked_int("layers", params.layers, 1, 16)
    most_steps = limits.max_inference_steps
    steps = checked_int("num_inference_steps", params.num_inference_steps, 1, most_steps, "--max-inference-steps")
    extra = checked_extra(params.extra, info)
    num_timesteps = _counted_timesteps(steps, info)
    if info.call_arguments is not None:
        # An estimate: pipelines round it in ways of their own.
        num_timesteps = max(1, math.ceil(num_timesteps * _checked_strength(extra, info)))
    count = checked_int("n", params.n, 1, MAX_IMAGES_PER_REQUEST)
    check_results(height, width, num_frames, layers, count, info, limits)
    check_copies(images, count, limits)
    guidance = checked_guidance(params, info)
    negative = _checked_negative(params, info, limit, _counting_images(count_tokens, info, len(images)))
    is_on = guidance.scale > 1 and bool(guidance.guided_steps(num_timesteps))
    branches = [text, negative] if is_on and negative else [text]
    guided = len(branches) > 1
    cache = checked_cache(params, asked, guided)
    sizes = [(image.width, image.height) for image in images]
    condition_tokens, condition_text_tokens = info.tokens_of_images(sizes, height, width)
    first_seed = checked_seed(params.seed, count)
    lora = checked_lora(params.lora, adapters or {}, max_adapters)
    requests = [
        DiffusionRequest(
            prompts=[branch for branch, _ in branches],
            text_tokens=[tokens + condition_text_tokens for _, tokens in branches],
            image_tokens=info.image_tokens(height, width, num_frames, layers),
            condition_tokens=condition_tokens,
            images=list(images),
            text_sees_images=info.text.sees_images,
            is_captioned=text[0] in info.text.captioned,
            height=height,
            width=width,
            num_frames=num_frames,
            layers=layers,
            max_sequence_length=0 if params.max_sequence_length is UNSET else limit,
            num_inference_steps=steps,
            num_timesteps=num_timesteps,
            guidance=guidance,
            cache=cache,
            call=info.call_arguments(params) if info.call_arguments else None,
            seed=first_seed + i,
            lora=lora,
            guidance_off="" if guided else _why_guidance_is_off(asked, info, guidance, num_timesteps),
        )
        for i in range(count)
    ]
    return [info.with_more_branches(request) for request in requests] if guided else requests


def _with_defaults(params: DiffusionParams, info: PipelineInfo, images: Sequence[ImageInput]) -> DiffusionParams:
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    if info.default_size is not None and fields["height"] is UNSET and fields["width"] is UNSET:
        fields["height"], fields["width"] = info.default_size([(image.width, image.height) for image in images])
    for name, value in fields.items():
        if value is UNSET:
            fields[name] = getattr(info.default_params, name)
    return DiffusionParams(**fields)


def _checked_negative(
    params: DiffusionParams, info: PipelineInfo, limit: int, count_tokens: Callable[[str], int]
) -> tuple[str, int] | None:
    """The negative branch's text and what it takes in the sequence; None where there is none."""
    negative = params.negative_prompt
    if negative is UNSET or negative is None:
        if info.needs_negative_prompt:
            return None
        negative = ""
    return checked_prompt("negative_prompt", negative, info, limit, count_tokens)


def _counting_images(count_tokens: Callable[[str], int], info: PipelineInfo, images: int) -> Callable[[str], int]:
    """Counts a prompt with what the text encoder is given of so many images around it."""
    return lambda text: count_tokens(info.text.with_images(text, images))


def _why_guidance_is_off(asked: DiffusionParams, info: PipelineInfo, guidance: Guidance, steps: int) -> str:
    """The reason, for a user who asked for guidance by giving a part of it; '' for one who did not ask."""
    if asked.guidance_interval is not UNSET and not guidance.guided_steps(steps):
        return f"none of {steps} steps is in the guidance interval {list(guidance.interval)}"
    given, off = guidance.scale - info.cfg_scale_offset, 1 - info.cfg_scale_offset
    parts = _asked_parts(asked, guidance)
    if parts and guidance.scale <= 1:
        return f"{parts[0]} was given, but {info.cfg_scale} is {given:g}, not above {off:g}"
    if guidance.scale > 1 and (parts or getattr(asked, info.cfg_scale) is not UNSET):
        return f"{info.cfg_scale} is {given:g}, but there is no negative prompt (an empty one is enough)"
    return ""


def _asked_parts(asked: DiffusionParams, guidance: Guidance) -> list[str]:
    """What was given that only guidance reads, but for its scale."""
    parts = ["a negative prompt"] if isinstance(asked.negative_prompt, str) else []
    if asked.guidance_scale_2 is not UNSET and (guidance.scale_2 or 0) > 1:
        parts.append("guidance_scale_2")
    fields = {"guidance_interval": (0, 1), "combine_rule": "cfg", "cfg_normalize": False, "guidance_rescale": 0}
    for name, neutral in fields.items():
        value = getattr(asked, name)
        if value is not UNSET and value != neutral:
            parts.append(name)
    return parts


def _checked_strength(extra: Mapping[str, object], info: PipelineInfo) -> float:
    """The share of the steps that a pipeline takes which begins with an image."""
    strength = extra.get("strength", info.strength)
    if not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise InvalidRequestError("strength", strength, "a number from 0 to 1")
    return strength


def _counted_timesteps(steps: int, info: PipelineInfo) -> int:
    try:
        return info.num_timesteps(steps)
    except InvalidRequestError:
        raise
    except ValueError as error:
        raise InvalidRequestError("num_inference_steps", steps, f"another number: {error}") from error
