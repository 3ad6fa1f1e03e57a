"""What a user may ask of one image, and how it becomes the exact request that the engine runs.

`DiffusionParams` is what users write; unset fields take the model's defaults. `resolve_requests` validates everything
once, in the front end, and returns one `DiffusionRequest` per image: nothing invalid goes further. Must not import
torch or vLLM.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

import msgspec
from msgspec import UNSET, UnsetType

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.errors import InvalidRequestError

MAX_IMAGES_PER_REQUEST = 10  # OpenAI's limit of `n`
MAX_SEED = 2**63 - 1
MIN_SEED = -(2**63)


class DiffusionParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Parameters of one generation; a field left UNSET takes the model's default.

    Attributes:
        negative_prompt: text of the negative branch. None, like a model without a default, means none: guidance is off.
            An empty string is a negative prompt.
        height, width: pixels of the image.
        num_inference_steps: denoising steps.
        true_cfg_scale: classifier-free guidance scale s of `neg + s * (pos - neg)`; guidance is on above 1.
        guidance_scale: the same scale under the name other pipelines use; `true_cfg_scale` wins when both are given.
        seed: 64-bit integer; unset or None draws one, which the outputs report.
        n: images, with seeds seed, seed + 1, ...
    """

    negative_prompt: str | UnsetType | None = UNSET
    height: int | UnsetType = UNSET
    width: int | UnsetType = UNSET
    num_inference_steps: int | UnsetType = UNSET
    true_cfg_scale: float | UnsetType = UNSET
    guidance_scale: float | UnsetType = UNSET
    seed: int | UnsetType | None = UNSET
    n: int = 1


class DiffusionRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One image, fully decided: what travels to the engine and, once, to every rank.

    Attributes:
        prompts: one text per branch, in branch order: the positive one, then the negative one if guided.
        text_tokens: tokens that each branch's text adds to its sequence, in the same order.
        image_tokens: tokens of the latents.
        guidance_off: why a request that asked for guidance runs without it; empty otherwise.
        progress_key: the caller's name of this request on the progress channel.
    """

    prompts: list[str]
    text_tokens: list[int]
    image_tokens: int
    height: int
    width: int
    num_inference_steps: int
    true_cfg_scale: float
    seed: int
    guidance_off: str = ""
    progress_key: str = ""

    @property
    def guided(self) -> bool:
        return len(self.prompts) > 1


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator allows; read from the engine's `additional_config` (see config.py)."""

    max_image_pixels: int = 4_194_304
    max_inference_steps: int = 200


def resolve_requests(
    prompt: object,
    params: DiffusionParams,
    info: PipelineInfo,
    limits: RequestLimits,
    count_tokens: Callable[[str], int],
) -> list[DiffusionRequest]:
    """Validate one prompt with its parameters; returns `params.n` requests.

    Args:
        count_tokens: number of sequence tokens that a prompt takes in the model.

    Raises:
        InvalidRequestError: naming the first wrong field, its value and what is allowed.
    """
    asked = params
    params = _with_defaults(asked, info.default_params)
    text = _checked_prompt("prompt", prompt, info, count_tokens)
    height = _checked_side("height", params.height, info)
    width = _checked_side("width", params.width, info)
    if height * width > limits.max_image_pixels:
        raise InvalidRequestError("size", f"{width}x{height}", f"at most {limits.max_image_pixels} pixels in all")
    steps = _checked_int("num_inference_steps", params.num_inference_steps, info.min_steps, limits.max_inference_steps)
    count = _checked_int("n", params.n, 1, MAX_IMAGES_PER_REQUEST)
    scale = _checked_scale(params)
    branches = [text]
    if params.negative_prompt is not UNSET and params.negative_prompt is not None:
        branches.append(_checked_prompt("negative_prompt", params.negative_prompt, info, count_tokens, empty_ok=True))
    guided = scale > 1 and len(branches) == 2
    branches = branches if guided else branches[:1]
    first_seed = _checked_seed(params.seed, count)
    text_tokens = [tokens for _, tokens in branches]
    return [
        DiffusionRequest(
            prompts=[branch for branch, _ in branches],
            text_tokens=text_tokens,
            image_tokens=info.image_tokens(height, width),
            height=height,
            width=width,
            num_inference_steps=steps,
            true_cfg_scale=scale,
            seed=first_seed + i,
            guidance_off="" if guided else _why_guidance_is_off(asked, scale),
        )
        for i in range(count)
    ]


def _with_defaults(params: DiffusionParams, defaults: DiffusionParams) -> DiffusionParams:
    """Fill unset fields; a scale given under either name keeps the other name's default out."""
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    scale_given = params.true_cfg_scale is not UNSET or params.guidance_scale is not UNSET
    for name, value in fields.items():
        is_scale = name in ("true_cfg_scale", "guidance_scale")
        if value is UNSET and not (is_scale and scale_given):
            fields[name] = getattr(defaults, name)
    return DiffusionParams(**fields)


def _checked_prompt(
    param: str, prompt: object, info: PipelineInfo, count_tokens: Callable[[str], int], empty_ok: bool = False
) -> tuple[str, int]:
    """The prompt and its number of tokens."""
    if not isinstance(prompt, str):
        raise InvalidRequestError(param, prompt, "a string")
    if not empty_ok and not prompt.strip():
        raise InvalidRequestError(param, prompt, "a non-empty string")
    if not _is_encodable(prompt):
        raise InvalidRequestError(param, prompt, "text that UTF-8 can encode (no lone surrogates)")
    tokens = count_tokens(prompt)
    if tokens > info.max_text_tokens:
        raise InvalidRequestError(
            param, prompt, f"at most {info.max_text_tokens} tokens long for this model, and this one has {tokens}"
        )
    return prompt, tokens


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked_side(param: str, value: object, info: PipelineInfo) -> int:
    allowed = f"a positive multiple of {info.size_multiple}"
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value % info.size_multiple:
        raise InvalidRequestError(param, value, allowed)
    return value


def _checked_int(param: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(param, value, f"an integer from {low} to {high}")
    return value


def _checked_scale(params: DiffusionParams) -> float:
    for param in ("true_cfg_scale", "guidance_scale"):
        value = getattr(params, param)
        if value is UNSET:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise InvalidRequestError(param, value, "a finite number from 0 up")
    given = params.guidance_scale if params.true_cfg_scale is UNSET else params.true_cfg_scale
    return 1.0 if isinstance(given, UnsetType) else float(given)


def _why_guidance_is_off(asked: DiffusionParams, scale: float) -> str:
    """The reason, for a user who asked for guidance by giving one half of it; '' for one who did not ask."""
    if isinstance(asked.negative_prompt, str) and scale <= 1:
        return f"a negative prompt was given, but the guidance scale {scale:g} is not above 1"
    if scale > 1 and (asked.true_cfg_scale is not UNSET or asked.guidance_scale is not UNSET):
        return f"the guidance scale is {scale:g}, but there is no negative prompt (an empty one is enough)"
    return ""


def _checked_seed(value: object, count: int) -> int:
    """The first of `count` consecutive seeds."""
    if value is None or value is UNSET:
        return secrets.randbelow(2**31)
    allowed = f"an integer from {MIN_SEED} to {MAX_SEED - count + 1}"
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_SEED <= value <= MAX_SEED - count + 1:
        raise InvalidRequestError("seed", value, allowed)
    return value
