"""What each field of a request may be: its value, checked, or an error that names it. Must not import torch or vLLM."""

from __future__ import annotations

import difflib
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence

from msgspec import UNSET

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import (
    CACHE_BRANCHES,
    CACHE_MODES,
    CACHE_NUMBERS,
    COMBINE_RULES,
    GUIDANCE_FIELDS,
    MAX_CACHE_ORDER,
    MAX_SEED,
    MIN_SEED,
    TOGETHER,
    DiffusionParams,
    Guidance,
    ImageInput,
    RequestLimits,
    StepCache,
)

_SCALES = ("true_cfg_scale", "guidance_scale")
_MAX_CACHE_INTERVAL = 100
_MAX_SCALE = 1000  # far beyond any use; much larger ones would only overflow
# Fields that only some models read; `PipelineInfo.options`, `cfg_scale` and `distilled_scale` say which.
_OPTIONAL = (*_SCALES, "guidance_scale_2", "num_frames", "layers", "max_sequence_length")


def is_read(name: str, info: PipelineInfo) -> bool:
    """Whether this model reads a field of a request."""
    if name in info.lacks:
        return False
    if name in GUIDANCE_FIELDS:
        return name in info.guidance_fields
    return name not in _OPTIONAL or name in info.options or name in (info.cfg_scale, info.distilled_scale)


def check_known_fields(asked: DiffusionParams, info: PipelineInfo) -> None:
    """Reject what this model does not read: it would be ignored."""
    for name in sorted(info.lacks - set(_OPTIONAL)):
        if (value := getattr(asked, name)) is not UNSET:
            raise InvalidRequestError(name, value, "absent: this model does not take it")
    for name in _OPTIONAL:
        value = getattr(asked, name)
        if value is UNSET or is_read(name, info):
            continue
        remedy = f": this model's guidance scale is {info.cfg_scale}" if name in _SCALES else ": this model has none"
        raise InvalidRequestError(name, value, f"absent{remedy}")
    for name in sorted(GUIDANCE_FIELDS - info.guidance_fields):
        if (value := getattr(asked, name)) is not UNSET:
            raise InvalidRequestError(name, value, "absent: this model's guidance does not read it")


def checked_extra(extra: Mapping[str, object], info: PipelineInfo) -> dict[str, object]:
    """The fields of diffusers' own pipeline, each of a type that it takes."""
    for name, value in extra.items():
        if name not in info.extra_fields:
            near = difflib.get_close_matches(name, info.extra_fields, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InvalidRequestError(name, value, f"absent: this model has no field of that name{hint}")
        if not _is_of(value, info.extra_fields[name]):
            raise InvalidRequestError(name, value, f"of the type {info.extra_fields[name]}")
    return {name: value for name, value in extra.items() if value is not None}


def _is_of(value: object, annotation: str) -> bool:
    """Whether a value fits an annotation, all of whose types are plain."""
    if value is None:
        return "None" in annotation or "Optional" in annotation
    if isinstance(value, (list, tuple)):
        return bool(re.search(r"\b([Ll]ist|[Tt]uple)\b", annotation)) and all(
            _is_of(item, annotation) for item in value
        )
    if isinstance(value, bool):
        return "bool" in annotation
    if isinstance(value, int):
        return "int" in annotation or "float" in annotation
    if isinstance(value, float):
        return "float" in annotation and math.isfinite(value)
    return isinstance(value, str) and "str" in annotation


def check_image_count(count: int, info: PipelineInfo, limits: RequestLimits) -> None:
    """Check that the model takes this number of images; needs none of them decoded.

    Raises:
        InvalidRequestError: of "image".
    """
    most = min(info.max_images, limits.max_input_images)
    given = counted(count, "image") if count else None
    if count and not info.max_images:
        raise InvalidRequestError("image", given, f"absent: this model does {info.task}")
    if not info.min_images <= count <= most:
        allowed = counted(most, "image") if most <= info.min_images else f"{info.min_images} to {most} images"
        if info.produces == "video" and most > 1:
            allowed += ", the first frame and the last,"
        if info.takes_mask and most >= info.min_images:
            allowed = "an image and its mask (white, or of no opacity, where it is to be changed)"
        whose = "on this server (--max-input-images)" if most < info.max_images else "for this model"
        raise InvalidRequestError("image", given, f"{allowed} {whose}, which does {info.task}")


def counted(count: int, noun: str) -> str:
    """1 -> "1 image", 2 -> "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def check_images(images: Sequence[ImageInput], info: PipelineInfo, limits: RequestLimits) -> None:
    check_image_count(len(images), info, limits)
    for image in images:
        if image.width * image.height > limits.max_input_pixels:
            size = f"{image.width}x{image.height}"
            raise InvalidRequestError(
                "image", size, f"of at most {limits.max_input_pixels} pixels (--max-input-pixels)"
            )


def check_copies(images: Sequence[ImageInput], count: int, limits: RequestLimits) -> None:
    """Each of the results takes the images along: a small upload may unpack to gigabytes."""
    pixels = sum(image.width * image.height for image in images)
    most = TOGETHER * limits.max_input_pixels
    rule = f"(four times --max-input-pixels, which is {limits.max_input_pixels})"
    if pixels > most:
        allowed = f"of at most {most} pixels, all images together {rule}"
        raise InvalidRequestError("image", f"{pixels} pixels in all", allowed)
    if pixels * count > most:
        raise InvalidRequestError("n", count, f"at most {most // pixels} with images of {pixels} pixels in all {rule}")


def check_results(
    height: int, width: int, num_frames: int, layers: int, count: int, info: PipelineInfo, limits: RequestLimits
) -> None:
    """A result's frames or layers come together, and all results of a request are held until the last is done."""
    is_video, pixels = info.produces == "video", height * width
    most = limits.max_video_pixels if is_video else limits.max_image_pixels
    flag = "--max-video-pixels" if is_video else "--max-image-pixels"
    parts = max(num_frames, layers)
    if pixels * parts > most:
        param, noun = ("num_frames", "frames") if is_video else ("layers", "layers")
        allowed = f"at most {most // pixels} of {width}x{height}: all {noun} together may have {most} pixels ({flag})"
        raise InvalidRequestError(param, parts, allowed)
    if pixels * parts * count > TOGETHER * most:
        together = TOGETHER * most // (pixels * parts)
        allowed = f"at most {together} of this size: all results together may have {TOGETHER * most} pixels"
        raise InvalidRequestError("n", count, f"{allowed} (four times {flag}, which is {most})")


def checked_text_limit(params: DiffusionParams, info: PipelineInfo) -> int:
    """Most tokens of a text."""
    if params.max_sequence_length is UNSET:
        return info.text.max_tokens
    return checked_int("max_sequence_length", params.max_sequence_length, 1, info.text.max_tokens)


def checked_prompt(
    param: str, prompt: object, info: PipelineInfo, limit: int, count_tokens: Callable[[str], int]
) -> tuple[str, int]:
    """The prompt and what it takes in the sequence.

    An empty one is as good as any. One that is too long is refused where diffusers would cut it without a word.
    """
    if not isinstance(prompt, str):
        raise InvalidRequestError(param, prompt, "a string")
    if not _is_encodable(prompt):
        raise InvalidRequestError(param, prompt, "text that UTF-8 can encode (no lone surrogates)")
    if found := [word for word in info.text.reserved if word in prompt]:
        raise InvalidRequestError(param, prompt, f"without {found[0]}, which stands for an image in this model")
    tokens = count_tokens(prompt)
    if tokens > limit:
        can_be_more = limit < info.text.max_tokens
        remedy = f"; max_sequence_length may be up to {info.text.max_tokens}" if can_be_more else ""
        raise InvalidRequestError(param, prompt, f"at most {limit} tokens long, and this one has {tokens}{remedy}")
    return prompt, info.text.sequence_tokens(tokens, limit)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def checked_size(params: DiffusionParams, info: PipelineInfo, limits: RequestLimits) -> tuple[int, int]:
    """(height, width)."""
    height = _checked_side("height", params.height, info)
    width = _checked_side("width", params.width, info)
    if info.sizes and (height, width) not in info.sizes:
        allowed = ", ".join(f"{width}x{height}" for height, width in info.sizes)
        raise InvalidRequestError("size", f"{width}x{height}", f"one of {allowed}: this model makes no others")
    if height * width > limits.max_image_pixels:
        raise InvalidRequestError(
            "size", f"{width}x{height}", f"at most {limits.max_image_pixels} pixels in all (--max-image-pixels)"
        )
    return height, width


def _checked_side(param: str, value: object, info: PipelineInfo) -> int:
    allowed = f"a positive multiple of {info.size_multiple}"
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value % info.size_multiple:
        raise InvalidRequestError(param, value, allowed)
    if info.max_side and value > info.max_side:
        raise InvalidRequestError(param, value, f"at most {info.max_side} for this model")
    return value


def checked_frames(params: DiffusionParams, info: PipelineInfo, images: int) -> int:
    if params.num_frames is UNSET:
        return 1
    frames = params.num_frames
    per_latent = info.frames_per_latent
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1 or (frames - 1) % per_latent:
        near = 1 if not isinstance(frames, int) or frames < 1 else (frames - 1) // per_latent * per_latent + 1
        allowed = f"a multiple of {per_latent} plus 1, e.g. {near} or {near + per_latent}"
        raise InvalidRequestError("num_frames", frames, allowed)
    if info.max_frames and frames > info.max_frames:
        raise InvalidRequestError("num_frames", frames, f"at most {info.max_frames} for this model")
    if frames < images:
        raise InvalidRequestError(
            "num_frames", frames, f"at least {images}: the images are its first frame and its last"
        )
    return frames


def checked_int(param: str, value: object, low: int, high: int, flag: str = "") -> int:
    """The value; `flag` is the operator's that sets `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(param, value, f"an integer from {low} to {high}{flag and f' ({flag})'}")
    return value


def checked_guidance(params: DiffusionParams, info: PipelineInfo) -> Guidance:
    scales = {name: _checked_scale(name, getattr(params, name)) for name in _OPTIONAL if "scale" in name}
    rule = "cfg" if params.combine_rule is UNSET else params.combine_rule
    if rule not in COMBINE_RULES:
        raise InvalidRequestError("combine_rule", rule, f"one of {', '.join(COMBINE_RULES)}")
    normalize = False if params.cfg_normalize is UNSET else params.cfg_normalize
    if not isinstance(normalize, bool):
        raise InvalidRequestError("cfg_normalize", normalize, "true or false")
    rescale = 0.0 if params.guidance_rescale is UNSET else params.guidance_rescale
    if not _is_number(rescale) or not 0 <= rescale <= 1:
        raise InvalidRequestError("guidance_rescale", rescale, "a number from 0 to 1")
    scale = scales[info.cfg_scale]
    interval = (0.0, 1.0) if params.guidance_interval is UNSET else params.guidance_interval
    return Guidance(
        scale=1.0 if scale is None else scale + info.cfg_scale_offset,
        scale_2=scales["guidance_scale_2"],
        distilled=scales.get(info.distilled_scale),
        rule=rule,
        normalize=normalize,
        rescale=float(rescale),
        interval=_checked_fractions("guidance_interval", interval),
    )


def checked_cache(params: DiffusionParams, asked: DiffusionParams, guided: bool) -> StepCache | None:
    """The request's cache of steps; None without one.

    Args:
        params: with the model's defaults; asked: without.
        guided: whether there are further branches than the positive one.
    """
    mode = "off" if params.cache is UNSET else params.cache
    if mode not in CACHE_MODES:
        raise InvalidRequestError("cache", mode, f"one of {', '.join(CACHE_MODES)}")
    if mode == "off":
        for name in CACHE_NUMBERS:
            if (value := getattr(asked, name)) is not UNSET:
                raise InvalidRequestError(name, value, 'absent where cache is not "static"')
        return None
    default = StepCache()
    branches = "all" if params.cache_branches is UNSET else params.cache_branches
    if branches not in CACHE_BRANCHES:
        raise InvalidRequestError("cache_branches", branches, f"one of {', '.join(CACHE_BRANCHES)}")
    if asked.cache_branches == "negative" and not guided:
        raise InvalidRequestError("cache_branches", branches, '"all": without guidance there is no negative branch')
    interval = default.interval if params.cache_interval is UNSET else params.cache_interval
    order = default.order if params.cache_order is UNSET else params.cache_order
    fractions = default.range if params.cache_range is UNSET else params.cache_range
    return StepCache(
        interval=checked_int("cache_interval", interval, 2, _MAX_CACHE_INTERVAL),
        range=_checked_fractions("cache_range", fractions),
        order=checked_int("cache_order", order, 0, MAX_CACHE_ORDER),
        negative_only=branches == "negative",
    )


def _checked_scale(param: str, value: object) -> float | None:
    if value is UNSET:
        return None
    if not _is_number(value) or not 0 <= value <= _MAX_SCALE:  # type: ignore[operator]
        raise InvalidRequestError(param, value, f"a number from 0 to {_MAX_SCALE}")
    return float(value)  # type: ignore[arg-type]


def _checked_fractions(param: str, value: object) -> tuple[float, float]:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(edge) for edge in value):
        start, stop = value
        if 0 <= start < stop <= 1:
            return (float(start), float(stop))
    raise InvalidRequestError(param, value, "[start, stop], fractions of the steps: 0 <= start < stop <= 1")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)  # which fails for an int that no float can hold


def checked_seed(value: object, count: int) -> int:
    """The first of `count` consecutive seeds."""
    if value is None or value is UNSET:
        return secrets.randbelow(2**31)
    allowed = f"an integer from {MIN_SEED} to {MAX_SEED - count + 1}"
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_SEED <= value <= MAX_SEED - count + 1:
        raise InvalidRequestError("seed", value, allowed)
    return value
