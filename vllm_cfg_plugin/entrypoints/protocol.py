"""The OpenAI images schemas: what the official clients send to and read from `/v1/images/generations` and `/edits`.

What a field may hold is decided here only as far as `resolve.resolve_requests` does not decide it. Nothing is silently
ignored: what can't be honoured is refused, naming the field. Must not import vLLM or torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import COMBINE_RULES, DiffusionParams

MAX_PROMPT_CHARACTERS = 32_000  # OpenAI's limit
FULL_QUALITY = "high"  # what a response calls the one quality that a model has

ImageFormat = Literal["png", "jpeg", "webp"]

# Fields of a body that are those of `DiffusionParams`.
_PASSED_ON = tuple(
    name
    for name in DiffusionParams.__struct_fields__
    if name not in ("height", "width", "num_frames", "negative_prompt")
)
# Fields of a form that are texts, where "" and "null" are texts too.
_TEXTS = ("prompt", "negative_prompt")

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
_FORMATS: dict[str | None, ImageFormat] = {None: "png", "png": "png", "jpeg": "jpeg", "jpg": "jpeg", "webp": "webp"}

# field -> (values that ask for what we do, what to say to the others)
_Served = dict[str, tuple[tuple[object, ...], str]]

# Of a model whose results have an alpha channel; the rest is as in `ImagesRequest._SERVED`.
_SERVED_TRANSPARENT: _Served = {
    "output_format": ((None, "png", "webp"), '"png" or "webp" for this model: JPEG holds no transparency'),
    "background": ((None, "auto", "transparent"), '"auto" or "transparent": the model draws transparent layers'),
}


class ImagesRequest(BaseModel):
    """Body of POST /v1/images/generations, and all that it has in common with /v1/images/edits.

    An explicit null means the default, as if the field were absent, except that a null `negative_prompt` means none.
    """

    # Strict: "2" is not a number and true is not 1. Unknown fields are kept to be refused with a hint, see `check`.
    model_config = ConfigDict(strict=True, extra="allow")

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS)
    model: str | None = None
    n: int | None = None
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto for the model's own size")
    seed: int | None = Field(None, description="of the first image; drawn, and returned, if absent")
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT_CHARACTERS)
    num_inference_steps: int | None = None
    true_cfg_scale: float | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    image_guidance_scale: float | None = None
    guidance_interval: list[float] | None = Field(None, description="[start, stop], fractions of the steps")
    guidance_rescale: float | None = None
    cfg_normalize: bool | None = None
    combine_rule: str | None = Field(None, description=", ".join(COMBINE_RULES))
    layers: int | None = None
    response_format: str | None = None
    output_format: str | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of JPEG and WebP, default 100")
    quality: str | None = None
    background: str | None = None
    moderation: str | None = None
    style: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    stream: bool | None = None
    partial_images: int | None = None

    _SERVED: ClassVar[_Served] = {
        "response_format": ((None, "b64_json"), '"b64_json": images are returned in the response, there are no URLs'),
        "output_format": (tuple(_FORMATS), '"png", "jpeg" or "webp"'),
        "quality": (
            (None, "auto", "high", "hd", "standard"),
            '"auto", "high", "hd" or "standard": the model has one quality; set num_inference_steps for a faster image',
        ),
        "background": ((None, "auto", "opaque"), '"auto" or "opaque": the model draws no transparency'),
        "moderation": ((None, "auto", "low"), '"auto" or "low"'),
        "style": ((None,), "absent or null: say the style in the prompt"),
        "stream": ((None, False), "false: this server does not stream"),
        "partial_images": ((None, 0), "0: this server does not stream"),
    }

    @model_validator(mode="before")
    @classmethod
    def _lift_extra_body(cls, data: Any) -> Any:
        """Python's client has an argument `extra_body` of fields beside the others; some write it into the body."""
        extra = data.get("extra_body") if isinstance(data, dict) else None
        if not isinstance(extra, dict) or not extra.keys().isdisjoint(data):
            return data
        return {**{name: value for name, value in data.items() if name != "extra_body"}, **extra}

    def check(self, is_transparent: bool = False) -> None:
        """Refuse what this server can't honour.

        Args:
            is_transparent: the model's results have an alpha channel.

        Raises:
            InvalidRequestError: naming the field.
        """
        for name, value in (self.model_extra or {}).items():
            if value is not None:  # a null asks for nothing
                raise self._unknown_field(name, value)
        for name, (served, allowed) in (self._SERVED | (_SERVED_TRANSPARENT if is_transparent else {})).items():
            if getattr(self, name) not in served:
                raise InvalidRequestError(name, getattr(self, name), allowed)
        if self.format == "png" and self.output_compression not in (None, 100):
            raise InvalidRequestError("output_compression", self.output_compression, "100 for PNG, which loses nothing")

    @property
    def format(self) -> ImageFormat:
        return _FORMATS[self.output_format]

    @property
    def lossy_quality(self) -> int:
        """0 to 100 of JPEG and WebP."""
        return 100 if self.output_compression is None else self.output_compression

    def to_params(self) -> DiffusionParams:
        """The parameters; `prompt` is passed beside them.

        Raises:
            InvalidRequestError: `size` is not WIDTHxHEIGHT.
        """
        width, height = self._sides()
        given = {name: value for name in _PASSED_ON if (value := getattr(self, name, None)) is not None}
        if "negative_prompt" in self.model_fields_set:
            given["negative_prompt"] = self.negative_prompt
        return DiffusionParams(height=height, width=width, **given)

    def _sides(self) -> tuple[int | UnsetType, int | UnsetType]:
        if self.size is None or self.size == "auto":
            return UNSET, UNSET
        match = _SIZE.fullmatch(self.size)
        if match is None:
            raise InvalidRequestError("size", self.size, 'WIDTHxHEIGHT in pixels, e.g. "512x512", or "auto"')
        return int(match[1]), int(match[2])

    def in_request_terms(self, error: InvalidRequestError) -> InvalidRequestError:
        """The parameters have a width and a height where this request has one `size`."""
        if error.param not in ("width", "height"):
            return error
        return InvalidRequestError("size", self.size, f'WIDTHxHEIGHT or "auto"; {error}')

    @classmethod
    def _unknown_field(cls, name: str, value: object) -> InvalidRequestError:
        close = difflib.get_close_matches(name, cls.model_fields, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        if name == "image" or name in EditsRequest.model_fields:
            hint = "; POST /v1/images/edits has it"
        return InvalidRequestError(name, value, f"absent: this endpoint has no field of that name{hint}")


class EditsRequest(ImagesRequest):
    """The fields of POST /v1/images/edits, without `image`."""

    input_fidelity: str | None = None
    mask: Any = None

    _SERVED: ClassVar[_Served] = {
        **ImagesRequest._SERVED,
        "input_fidelity": ((None, "high"), '"high" or absent: the model sees each image whole'),
        "mask": ((None,), "absent: the model takes no masks; say in the prompt which part of the image to change"),
    }

    @classmethod
    def from_form(cls, fields: Mapping[str, Any]) -> EditsRequest:
        """Of a form's fields, whose numbers and booleans are texts.

        An empty field means the default, as does "null", which is how OpenAI's JavaScript client wants a null written.

        Raises:
            InvalidRequestError: naming a field of the wrong type.
        """
        lifted = cls._lift_extra_body(dict(fields))
        given = {name: None if value in ("", "null") and name not in _TEXTS else value for name, value in lifted.items()}
        try:
            return cls.model_validate(given, strict=False)
        except ValidationError as errors:
            raise schema_error(errors.errors()[0]) from None


def schema_error(error: dict[str, Any]) -> InvalidRequestError:
    """One of pydantic's errors about a body, in our words."""
    path = [part for part in error["loc"] if part != "body"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    if error["type"] == "json_invalid":
        return InvalidRequestError("body", error.get("ctx", {}).get("error"), "valid JSON")
    if not path:
        return InvalidRequestError("body", error.get("input"), "a JSON object, sent as application/json")
    if error["type"] == "missing":
        return InvalidRequestError(param, None, "given")
    allowed = error["msg"].replace("Input should be ", "").replace("String should have", "a string with")
    return InvalidRequestError(param, error.get("input"), allowed[:1].lower() + allowed[1:])


class ImageData(BaseModel):
    """One image; `seed` and `metrics` (engine.result.RequestMetrics) are ours."""

    b64_json: str
    seed: int
    metrics: dict[str, Any]


class TokensDetails(BaseModel):
    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Tokens of the model's sequences: the texts of a prompt's branches, the images it brings, and all results."""

    input_tokens: int
    input_tokens_details: TokensDetails
    output_tokens: int
    output_tokens_details: TokensDetails
    total_tokens: int

    @classmethod
    def of(cls, text_tokens: int, condition_tokens: int, image_tokens: int) -> Usage:
        input_tokens = text_tokens + condition_tokens
        return cls(
            input_tokens=input_tokens,
            input_tokens_details=TokensDetails(image_tokens=condition_tokens, text_tokens=text_tokens),
            output_tokens=image_tokens,
            output_tokens_details=TokensDetails(image_tokens=image_tokens, text_tokens=0),
            total_tokens=input_tokens + image_tokens,
        )


class ImagesResponse(BaseModel):
    """Answer of both endpoints; every value is what was done, never "auto". A layered image is one entry per layer."""

    created: int
    data: list[ImageData]
    background: Literal["opaque", "transparent"]
    output_format: ImageFormat
    quality: str = FULL_QUALITY
    size: str
    usage: Usage
