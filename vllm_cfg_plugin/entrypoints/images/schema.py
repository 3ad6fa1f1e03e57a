"""The OpenAI images schemas: what the official clients send to and read from `/v1/images/generations` and `/edits`.

What they share with videos is in `fields`. Must not import vLLM or torch.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, cast

import msgspec
from pydantic import BaseModel, Field

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.entrypoints.fields import DiffusionFields, Served
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest

Quality = Literal["low", "medium", "high", "xhigh", "max"]

# The model's own number of denoising steps is "high"; each of the others takes a share of it.
STEPS_OF_QUALITY: dict[Quality, float] = {"low": 0.5, "medium": 0.75, "high": 1.0, "xhigh": 1.5, "max": 2.0}
_QUALITIES: dict[str | None, Quality] = {
    **{name: name for name in STEPS_OF_QUALITY},
    **dict.fromkeys((None, "auto", "standard"), "high"),
    "hd": "xhigh",
}

ImageFormat = Literal["png", "jpeg", "webp"]

# What the formats can hold; PNG holds more than any model makes.
_LARGEST_SIDES: dict[ImageFormat, int] = {"jpeg": 65_500, "webp": 16_383}

_FORMATS: dict[str | None, ImageFormat] = {None: "png", "png": "png", "jpeg": "jpeg", "jpg": "jpeg", "webp": "webp"}

# Of a model whose results have an alpha channel; the rest is as in `ImagesRequest._SERVED`.
_SERVED_TRANSPARENT: Served = {
    "output_format": ((None, "png", "webp"), '"png" or "webp" for this model: JPEG holds no transparency'),
    "background": ((None, "auto", "transparent"), '"auto" or "transparent": the model draws transparent layers'),
    "stream": ((None, False), "false for this model: a result is several images"),
}
_SERVED_WITHOUT_PREVIEWS: Served = {"partial_images": ((None, 0), "0 for this model: its steps can't be shown")}


class ImagesRequest(DiffusionFields):
    """Body of POST /v1/images/generations, and all that it has in common with /v1/images/edits."""

    n: int | None = None
    layers: int | None = None
    response_format: str | None = None
    output_format: str | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of JPEG and WebP, default 100")
    quality: str | None = None
    background: str | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, description="previews of a stream, 0 to 3")
    watermark: bool | None = None
    moderation: str | None = Field(None, description="ignored: nothing is moderated")
    style: str | None = Field(None, description="ignored: say it in the prompt")

    _SERVED: ClassVar[Served] = {
        "response_format": ((None, "b64_json", "url"), '"b64_json" or "url"'),
        "output_format": (tuple(_FORMATS), '"png", "jpeg" or "webp"'),
        "quality": (tuple(_QUALITIES), f'"auto", "standard", "hd" or one of {", ".join(STEPS_OF_QUALITY)}'),
        "background": ((None, "auto", "opaque"), '"auto" or "opaque": the model draws no transparency'),
        "watermark": ((None, False), "false: no image has one"),
        "partial_images": ((None, 0, 1, 2, 3), "0 to 3, the number of previews"),
    }

    def served(self, info: PipelineInfo) -> Served:
        without_previews = _SERVED_WITHOUT_PREVIEWS if info.call_arguments is not None else {}
        return self._SERVED | (_SERVED_TRANSPARENT if info.is_transparent else {}) | without_previews

    def check(self, info: PipelineInfo) -> None:
        super().check(info)
        if self.format == "png" and self.output_compression not in (None, 100):
            raise InvalidRequestError("output_compression", self.output_compression, "100 for PNG, which loses nothing")
        if self.partial_images and not self.stream:
            raise InvalidRequestError("partial_images", self.partial_images, '0 or absent without "stream": true')
        if self.stream and self.response_format == "url":
            raise InvalidRequestError("response_format", "url", '"b64_json" where "stream" is true')

    def to_params(self, info: PipelineInfo) -> DiffusionParams:
        params = super().to_params(info)
        share = STEPS_OF_QUALITY[self.quality_name]
        if share == 1:
            return params
        if self.num_inference_steps is not None:
            raise InvalidRequestError(
                "quality", self.quality, '"auto" beside num_inference_steps, which says it exactly'
            )
        steps = math.ceil(share * cast(int, info.default_params.num_inference_steps))
        return msgspec.structs.replace(params, num_inference_steps=steps)

    def in_request_terms(self, error: InvalidRequestError) -> InvalidRequestError:
        if error.param == "num_inference_steps" and self.num_inference_steps is None and self.quality is not None:
            allowed = f"another one: it stands for num_inference_steps={error.value}, which must be {error.allowed}"
            return InvalidRequestError("quality", self.quality, allowed)
        return super().in_request_terms(error)

    @property
    def quality_name(self) -> Quality:
        return _QUALITIES[self.quality]

    def check_result(self, request: DiffusionRequest) -> None:
        largest = _LARGEST_SIDES.get(self.format)
        if largest is not None and max(request.height, request.width) > largest:
            raise InvalidRequestError("output_format", self.output_format, f'"png" for sides above {largest} pixels')

    @property
    def format(self) -> ImageFormat:
        return _FORMATS[self.output_format]

    @property
    def lossy_quality(self) -> int:
        """0 to 100 of JPEG and WebP."""
        return 100 if self.output_compression is None else self.output_compression

    @classmethod
    def hint(cls, name: str, info: PipelineInfo) -> str:
        if name == EditsRequest.IMAGES or name in EditsRequest.model_fields:
            return "POST /v1/images/edits has it"
        return super().hint(name, info)


class EditsRequest(ImagesRequest):
    """The fields of POST /v1/images/edits, without `image`."""

    IMAGES: ClassVar[str] = "image"

    input_fidelity: str | None = Field(None, description="ignored: the model sees each image whole")
    mask: Any = None

    _SERVED: ClassVar[Served] = {
        **ImagesRequest._SERVED,
        "mask": ((None,), "absent: the model takes no masks; say in the prompt which part of the image to change"),
    }

    def served(self, info: PipelineInfo) -> Served:
        served = super().served(info)
        return {name: rule for name, rule in served.items() if name != "mask"} if info.takes_mask else served


class JsonEditsRequest(EditsRequest):
    """The fields of a JSON body of POST /v1/images/edits, without `images`."""

    IMAGES: ClassVar[str] = "images"


def edits_form_schema() -> dict[str, Any]:
    """What OpenAPI says of the body of /v1/images/edits."""
    schema = EditsRequest.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["properties"][EditsRequest.IMAGES] = {"anyOf": [file, {"type": "array", "items": file}]}
    schema["required"] = [*schema["required"], EditsRequest.IMAGES]
    as_json = JsonEditsRequest.model_json_schema()
    reference = {"type": "object", "properties": {"image_url": {"type": "string"}}, "required": ["image_url"]}
    as_json["properties"][JsonEditsRequest.IMAGES] = {"type": "array", "items": reference}
    as_json["required"] = [*as_json["required"], JsonEditsRequest.IMAGES]
    content = {"multipart/form-data": {"schema": schema}, "application/json": {"schema": as_json}}
    return {"requestBody": {"required": True, "content": content}}


class ImageData(BaseModel):
    """One image, as text or under a link; `seed` and `metrics` (engine.result.RequestMetrics) are ours."""

    b64_json: str | None = None
    url: str | None = None
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
    quality: Quality
    size: str
    usage: Usage
