"""One images request, from its checked body to the response: engine calls, cancellation, image files. Knows no HTTP.

n images are n engine requests that run at once; when one fails, or the caller is cancelled, the others are aborted.
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from PIL import Image
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_cfg_plugin.entrypoints.front_end import FrontEnd, GeneratedImage, pooling_params, read_output
from vllm_cfg_plugin.entrypoints.protocol import ImageData, ImageFormat, ImagesRequest, ImagesResponse, Usage
from vllm_cfg_plugin.errors import InvalidRequestError, ModelNotFoundError, RequestAbortedError
from vllm_cfg_plugin.model import PLACEHOLDER_PROMPT
from vllm_cfg_plugin.params import DiffusionRequest

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

_SHUTDOWN_POLL_S = 0.5


class ImagesService:
    """Serves one engine's model under one or more names.

    Args:
        is_stopping: whether the server has begun to shut down.
    """

    def __init__(
        self, engine: EngineClient, front_end: FrontEnd, model_names: list[str], is_stopping: Callable[[], bool]
    ) -> None:
        self._engine = engine
        self._front_end = front_end
        self._model_names = model_names
        self._is_stopping = is_stopping

    async def generate(self, body: ImagesRequest, request_id: str) -> ImagesResponse:
        """The images of one request.

        Raises:
            InvalidRequestError, ModelNotFoundError: the request is wrong; nothing has run.
            RequestFailedError: one of its images failed.
            RequestAbortedError: the server or the engine stopped first.
            vllm's EngineDeadError: the engine died.
        """
        requests = self._resolve(body)
        work = asyncio.ensure_future(self._run_all(requests, request_id))
        try:
            images = await self._unless_stopping(work, request_id)
        finally:
            work.cancel()
        return await asyncio.to_thread(_response, body, requests, images)

    def _resolve(self, body: ImagesRequest) -> list[DiffusionRequest]:
        if body.model is not None and body.model not in self._model_names:
            served = ", ".join(self._model_names)
            raise ModelNotFoundError(f"model {body.model!r} does not exist; this server serves: {served}")
        body.check()
        try:
            return self._front_end.resolve(body.prompt, body.to_params())
        except InvalidRequestError as error:
            raise body.in_request_terms(error) from None

    async def _unless_stopping(
        self, work: asyncio.Future[list[GeneratedImage]], request_id: str
    ) -> list[GeneratedImage]:
        """Without this a server that shuts down would wait for images that a stopped engine never makes."""
        while not work.done():
            await asyncio.wait({work}, timeout=_SHUTDOWN_POLL_S)
            if self._is_stopping() and not work.done():
                raise _shutting_down(request_id)
        if isinstance(work.exception(), EngineDeadError):
            # A server that shuts down stops its engine first and says so a moment later.
            await asyncio.sleep(_SHUTDOWN_POLL_S)
            if self._is_stopping():
                raise _shutting_down(request_id)
        return work.result()

    async def _run_all(self, requests: list[DiffusionRequest], request_id: str) -> list[GeneratedImage]:
        try:
            async with asyncio.TaskGroup() as group:  # a failure or a cancellation cancels, and so aborts, the others
                tasks = [
                    group.create_task(self._run_one(request, f"{request_id}-{index}"))
                    for index, request in enumerate(requests)
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _run_one(self, request: DiffusionRequest, request_id: str) -> GeneratedImage:
        started = time.perf_counter()
        answer = None
        async for output in self._engine.encode(PLACEHOLDER_PROMPT, pooling_params(request), request_id):
            answer = output
        if answer is None:
            raise RequestAbortedError(f"request {request_id} was aborted: the engine gave no answer")
        return read_output(answer, 1000 * (time.perf_counter() - started))


def _shutting_down(request_id: str) -> RequestAbortedError:
    return RequestAbortedError(f"request {request_id} was aborted: the server is shutting down")


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
