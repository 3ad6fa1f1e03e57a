"""One images request, from its checked body to the response with its image files. Knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np

from vllm_cfg_plugin.entrypoints.engine_calls import EngineCalls
from vllm_cfg_plugin.entrypoints.fields import DiffusionFields
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd, GeneratedImage
from vllm_cfg_plugin.entrypoints.images.files import background_of, base64_file, file_of
from vllm_cfg_plugin.entrypoints.images.links import ImageLinks
from vllm_cfg_plugin.entrypoints.images.schema import EditsRequest, ImageData, ImagesRequest, ImagesResponse, Usage
from vllm_cfg_plugin.entrypoints.images.stream import ErrorBody, ImageStream
from vllm_cfg_plugin.entrypoints.input_budget import InputHold
from vllm_cfg_plugin.entrypoints.service import DiffusionService, Files, endpoint_of, in_thread
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.field_checks import counted
from vllm_cfg_plugin.params import DiffusionRequest


class ImagesService(DiffusionService):
    """Answers each request with its images.

    Args:
        links: where images are kept that are asked for as a link.
    """

    produces = "image"

    def __init__(self, calls: EngineCalls, front_end: FrontEnd, model_names: Sequence[str], links: ImageLinks) -> None:
        super().__init__(calls, front_end, model_names)
        self.links = links

    async def generate(
        self, body: ImagesRequest, request_id: str, hold: InputHold, files: Files = None, links_at: str = ""
    ) -> ImagesResponse:
        """The images of one request.

        Args:
            links_at: what links begin with, if it asks for any.
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
        return await in_thread(None, self._response, body, requests, results, links_at)

    async def stream(
        self, body: ImagesRequest, request_id: str, hold: InputHold, files: Files, error_body: ErrorBody
    ) -> ImageStream:
        """The events of one request, which has begun; to be closed.

        Args:
            error_body: what clients are told of an error that ends the stream.

        Raises:
            InvalidRequestError, ModelNotFoundError, ServerBusyError: as `generate`.
        """
        if body.partial_images and not self._calls.updates.are_heard:
            raise InvalidRequestError("partial_images", body.partial_images, "0: this server hears of no previews")
        async with self._admitted(body, files, hold) as requests:
            watched = [msgspec.structs.replace(request, previews=body.partial_images or 0) for request in requests]
            return ImageStream(self._calls, body, watched, request_id, hold, error_body)

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

    def _response(
        self, body: ImagesRequest, requests: list[DiffusionRequest], results: list[GeneratedImage], links_at: str
    ) -> ImagesResponse:
        """The answer; encodes the files, which takes long enough to be kept off the event loop."""
        first = requests[0]
        return ImagesResponse(
            created=int(time.time()),
            data=[
                ImageData(
                    **self._file(pixels, body, links_at),
                    seed=result.metrics.seed,
                    metrics=msgspec.structs.asdict(result.metrics),
                )
                for result in results
                for pixels in result.pixels
            ],
            background=background_of(results[0].pixels),
            output_format=body.format,
            quality=body.quality_name,
            size=f"{first.width}x{first.height}",
            usage=Usage.of(sum(first.text_tokens), first.condition_tokens, first.image_tokens * len(requests)),
        )

    def _file(self, pixels: np.ndarray, body: ImagesRequest, links_at: str) -> dict[str, str]:
        if body.response_format != "url":
            return {"b64_json": base64_file(pixels, body)}
        return {"url": links_at + self.links.add(file_of(pixels, body), body.format)}
