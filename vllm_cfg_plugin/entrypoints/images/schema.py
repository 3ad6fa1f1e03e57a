"""The OpenAI images schemas: what the official clients send to and read from `/v1/images/generations` and `/edits`.

What they share with videos is in `fields`. Must not import vLLM or torch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.entrypoints.fields import DiffusionFields, Served
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionRequest

FULL_QUALITY = "high"  # what a response calls the one quality that a model has

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


class ImagesRequest(DiffusionFields):
    """Body of POST /v1/images/generations, and all that it has in common with /v1/images/edits."""

    n: int | None = None
    layers: int | None = None
    response_format: str | None = None
    output_format: str | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of JPEG and WebP, default 100")
    quality: str | None = None
    background: str | None = None
    moderation: str | None = None
    style: str | None = None
    stream: bool | None = None
    partial_images: int | None = None

    _SERVED: ClassVar[Served] = {
        "response_format": ((None, "b64_json"), '"b64_json": images are returned in the response, there are no URLs'),
        "output_format": (tuple(_FORMATS), '"png", "jpeg" or "webp"'),
        "quality": (
            (None, "auto", "high", "hd", "standard"),
            '"auto", "high", "hd" or "standard": the model has one quality; set num_inference_steps for a faster image',
        ),
        "background": ((None, "auto", "opaque"), '"auto" or "opaque": the model draws no transparency'),
        "moderation": ((None, "auto", "low"), '"auto" or "low"'),
        "style": ((None,), "absent or null: say the style in the prompt"),
        "partial_images": ((None, 0, 1, 2, 3), "0 to 3, the number of previews"),
    }

    def served(self, info: PipelineInfo) -> Served:
        return self._SERVED | (_SERVED_TRANSPARENT if info.is_transparent else {})

    def check(self, info: PipelineInfo) -> None:
        super().check(info)
        if self.format == "png" and self.output_compression not in (None, 100):
            raise InvalidRequestError("output_compression", self.output_compression, "100 for PNG, which loses nothing")
        if self.partial_images and not self.stream:
            raise InvalidRequestError("partial_images", self.partial_images, '0 or absent without "stream": true')

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

    input_fidelity: str | None = None
    mask: Any = None

    _SERVED: ClassVar[Served] = {
        **ImagesRequest._SERVED,
        "input_fidelity": ((None, "high"), '"high" or absent: the model sees each image whole'),
        "mask": ((None,), "absent: the model takes no masks; say in the prompt which part of the image to change"),
    }


def edits_form_schema() -> dict[str, Any]:
    """What OpenAPI says of the body of /v1/images/edits."""
    schema = EditsRequest.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["properties"][EditsRequest.IMAGES] = {"anyOf": [file, {"type": "array", "items": file}]}
    schema["required"] = [*schema["required"], EditsRequest.IMAGES]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


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
