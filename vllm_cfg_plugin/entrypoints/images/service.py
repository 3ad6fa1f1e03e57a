"""One images request, from its checked body to the response with its image files. Knows no HTTP."""

from __future__ import annotations

import base64
import io
import time

import msgspec
import numpy as np
from PIL import Image

from vllm_cfg_plugin.entrypoints.fields import DiffusionFields
from vllm_cfg_plugin.entrypoints.front_end import GeneratedImage
from vllm_cfg_plugin.entrypoints.images.schema import (
    EditsRequest,
    ImageData,
    ImageFormat,
    ImagesRequest,
    ImagesResponse,
    Usage,
)
from vllm_cfg_plugin.entrypoints.input_budget import InputHold
from vllm_cfg_plugin.entrypoints.service import DiffusionService, Files, endpoint_of, in_thread
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.field_checks import counted
from vllm_cfg_plugin.params import DiffusionRequest


class ImagesService(DiffusionService):
    """Answers each request with its images."""

    produces = "image"

    async def generate(
        self, body: ImagesRequest, request_id: str, hold: InputHold, files: Files = None
    ) -> ImagesResponse:
        """The images of one request.

        Args:
            hold: of its input's memory.
            files: images that came with it, one or several; None without any.

        Raises:
            InvalidRequestError, ModelNotFoundError: the request is wrong; nothing has run.
            ServerBusyError: there is no room for it and all its results now; nothing has run.
            RequestFailedError: one of its images failed.
            RequestAbortedError: the server or the engine stopped first.
            vllm's EngineDeadError: the engine died.
        """
        async with self._admitted(body, files, hold) as requests:
            work = self._calls.start(requests, request_id)
        results = await self._calls.finish(work, request_id)
        return await in_thread(None, _response, body, requests, results)

    def _check_task(self, body: DiffusionFields, images: int) -> None:
        info, is_edit = self._front_end.info, isinstance(body, EditsRequest)
        if info.produces == self.produces:
            here = f"this model does {info.task}, at {endpoint_of(info)}"
            if is_edit and not info.max_images:
                raise InvalidRequestError("image", counted(images, "image"), f"absent: {here}")
            if is_edit and not images:
                allowed = "given, as a file; images from text alone: /v1/images/generations"
                raise InvalidRequestError("image", None, allowed)
            if not is_edit and info.min_images:
                raise InvalidRequestError("image", None, f"given: {here}")
        super()._check_task(body, images)


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
