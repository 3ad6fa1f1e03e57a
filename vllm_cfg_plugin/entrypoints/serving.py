"""One images request, from its checked body to the response with its image files. Knows no HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import time

import msgspec
import numpy as np
from PIL import Image

from vllm_cfg_plugin.entrypoints.engine_calls import EngineCalls
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd, GeneratedImage, check_model_name
from vllm_cfg_plugin.entrypoints.protocol import ImageData, ImageFormat, ImagesRequest, ImagesResponse, Usage
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionRequest


class ImagesService:
    """Serves one engine's model under one or more names.

    Args:
        calls: to that engine.
    """

    def __init__(self, calls: EngineCalls, front_end: FrontEnd, model_names: list[str]) -> None:
        self._calls = calls
        self._front_end = front_end
        self._model_names = model_names

    async def generate(self, body: ImagesRequest, request_id: str) -> ImagesResponse:
        """The images of one request.

        Raises:
            InvalidRequestError, ModelNotFoundError: the request is wrong; nothing has run.
            RequestFailedError: one of its images failed.
            RequestAbortedError: the server or the engine stopped first.
            vllm's EngineDeadError: the engine died.
        """
        requests = self._resolve(body)
        images = await self._calls.run(requests, request_id)
        return await asyncio.to_thread(_response, body, requests, images)

    def _resolve(self, body: ImagesRequest) -> list[DiffusionRequest]:
        check_model_name(body.model, self._model_names)
        body.check()
        try:
            return self._front_end.resolve(body.prompt, body.to_params())
        except InvalidRequestError as error:
            raise body.in_request_terms(error) from None


def encode_image(pixels: np.ndarray, image_format: ImageFormat, lossy_quality: int) -> bytes:
    """An image file; `pixels` uint8 [height, width, channels], quality 0 to 100 (not for PNG)."""
    options: dict[str, int] = {} if image_format == "png" else {"quality": lossy_quality}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=image_format.upper(), **options)
    return buffer.getvalue()


def _base64_file(pixels: np.ndarray, body: ImagesRequest) -> str:
    return base64.b64encode(encode_image(pixels, body.format, body.lossy_quality)).decode("ascii")


def _response(body: ImagesRequest, requests: list[DiffusionRequest], images: list[GeneratedImage]) -> ImagesResponse:
    """The answer; encodes the files, which takes long enough to be kept off the event loop."""
    first = requests[0]
    return ImagesResponse(
        created=int(time.time()),
        data=[
            ImageData(
                b64_json=_base64_file(pixels, body),
                seed=image.metrics.seed,
                metrics=msgspec.structs.asdict(image.metrics),
            )
            for image in images
            for pixels in image.pixels
        ],
        output_format=body.format,
        size=f"{first.width}x{first.height}",
        usage=Usage.of(sum(first.text_tokens), first.image_tokens * len(requests)),
    )
