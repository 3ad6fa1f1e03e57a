"""One images request, from its checked body to the response with its image files. Knows no HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import time

import msgspec
import numpy as np
from PIL import Image

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.entrypoints.engine_calls import EngineCalls
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd, GeneratedImage, check_model_name
from vllm_cfg_plugin.entrypoints.images.inputs import read_images
from vllm_cfg_plugin.entrypoints.images.schema import (
    EditsRequest,
    ImageData,
    ImageFormat,
    ImagesRequest,
    ImagesResponse,
    Usage,
)
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionRequest, ImageInput
from vllm_cfg_plugin.resolve import check_image_count


class ImagesService:
    """Serves one engine's model under one or more names.

    Args:
        calls: to that engine.
    """

    def __init__(self, calls: EngineCalls, front_end: FrontEnd, model_names: list[str]) -> None:
        self._calls = calls
        self._front_end = front_end
        self._model_names = model_names

    async def generate(
        self, body: ImagesRequest, request_id: str, images: bytes | list[bytes] | None = None
    ) -> ImagesResponse:
        """The images of one request.

        Args:
            images: files that came with it, one or several; None where none can.

        Raises:
            InvalidRequestError, ModelNotFoundError: the request is wrong; nothing has run.
            RequestFailedError: one of its images failed.
            RequestAbortedError: the server or the engine stopped first.
            vllm's EngineDeadError: the engine died.
        """
        requests = self._resolve(body, await self._read(body, images))
        results = await self._calls.run(requests, request_id)
        return await asyncio.to_thread(_response, body, requests, results)

    async def _read(self, body: ImagesRequest, images: bytes | list[bytes] | None) -> list[ImageInput]:
        """The images, decoded once everything is checked that can be checked without; not on the event loop."""
        info, limits = self._front_end.info, self._front_end.limits
        check_model_name(body.model, self._model_names)
        body.check(info.is_transparent)
        count = len(images) if isinstance(images, list) else int(images is not None)
        _check_endpoint(info, isinstance(body, EditsRequest), count, body.model or self._model_names[0])
        check_image_count(count, info, limits)
        if images is None:
            return []
        return await asyncio.to_thread(read_images, images, "image", limits.max_input_pixels)

    def _resolve(self, body: ImagesRequest, images: list[ImageInput]) -> list[DiffusionRequest]:
        try:
            requests = self._front_end.resolve(body.prompt, body.to_params(), images)
            body.check_size(requests[0].height, requests[0].width)
            return requests
        except InvalidRequestError as error:
            raise body.in_request_terms(error) from None


def _check_endpoint(info: PipelineInfo, edits: bool, images: int, model: str) -> None:
    """Point a request that the model can't serve to the endpoint that can.

    Args:
        edits: the request came to /v1/images/edits.
    """
    if info.produces != "image":
        raise InvalidRequestError("model", model, f"one that makes images: this one does {info.task}, at /v1/videos")
    if edits and not info.max_images:
        allowed = f"absent: this model does {info.task}, at /v1/images/generations"
        raise InvalidRequestError("image", f"{images} images", allowed)
    if edits and not images:
        raise InvalidRequestError("image", None, "given, as a file; images from text alone: /v1/images/generations")
    if not edits and info.min_images:
        raise InvalidRequestError("image", None, f"given: this model does {info.task}, at /v1/images/edits")


def encode_image(pixels: np.ndarray, image_format: ImageFormat, lossy_quality: int) -> bytes:
    """An image file; `pixels` uint8 [height, width, channels], quality 0 to 100 (not for PNG)."""
    options: dict[str, int] = {} if image_format == "png" else {"quality": lossy_quality}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=image_format.upper(), **options)
    return buffer.getvalue()


def _base64_file(pixels: np.ndarray, body: ImagesRequest) -> str:
    return base64.b64encode(encode_image(pixels, body.format, body.lossy_quality)).decode("ascii")


def _response(body: ImagesRequest, requests: list[DiffusionRequest], results: list[GeneratedImage]) -> ImagesResponse:
    """The answer; encodes the files, which takes long enough to be kept off the event loop."""
    first = requests[0]
    return ImagesResponse(
        created=int(time.time()),
        data=[
            ImageData(
                b64_json=_base64_file(pixels, body),
                seed=result.metrics.seed,
                metrics=msgspec.structs.asdict(result.metrics),
            )
            for result in results
            for pixels in result.pixels
        ],
        background="transparent" if results[0].pixels.shape[-1] == 4 else "opaque",
        output_format=body.format,
        size=f"{first.width}x{first.height}",
        usage=Usage.of(sum(first.text_tokens), first.condition_tokens, first.image_tokens * len(requests)),
    )
