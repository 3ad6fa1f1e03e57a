"""What images and videos over HTTP share: from a body and its files to the engine's requests. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.entrypoints.adapters import with_adapter
from vllm_cfg_plugin.entrypoints.engine_calls import EngineCalls
from vllm_cfg_plugin.entrypoints.fields import DiffusionFields
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd, check_model_name
from vllm_cfg_plugin.entrypoints.images.inputs import name_images, read_header, read_image
from vllm_cfg_plugin.entrypoints.input_budget import InputHold
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.field_checks import check_image_count
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, ImageInput

Reader = Callable[[object, str, int], ImageInput]
T = TypeVar("T")
Files = bytes | list[bytes] | None  # of the images that came along, once or several times


class DiffusionService:
    """Serves one engine's model under one or more names.

    Args:
        calls: to that engine.
    """

    produces: str  # "image" or "video"

    def __init__(self, calls: EngineCalls, front_end: FrontEnd, model_names: Sequence[str]) -> None:
        self._calls = calls
        self._front_end = front_end
        self._model_names = model_names
        # One thread, because decoding takes several times the memory of the image.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="cfg-images")

    def _model_name(self, body: DiffusionFields) -> str:
        return body.model or self._model_names[0]

    @asynccontextmanager
    async def _admitted(
        self, body: DiffusionFields, files: Files, hold: InputHold
    ) -> AsyncIterator[list[DiffusionRequest]]:
        """One engine request per result, with room in the engine's queue for those that are started in this block.

        No pixel is decoded before all is checked that can be without: fields, sizes in the files' headers, room in the
        queue and in memory.

        Raises:
            InvalidRequestError, ModelNotFoundError: the request is wrong.
            ServerBusyError: there is no room now.
        """
        front_end = self._front_end
        check_model_name(body.model, [*self._model_names, *front_end.adapters.named])
        body.check(front_end.info)
        try:
            self._check_task(body, count_files(files))
            headers = await self._read(read_header, body, files)
            params = self._params(body)
            requests = front_end.resolve(body.prompt, params, headers)
            body.check_result(requests[0])
            with self._calls.room_for(len(requests)):
                if headers:
                    hold.add(front_end.bytes_of(headers, len(requests)), body.IMAGES)
                    images = await self._read(read_image, body, files)
                    requests = front_end.resolve(body.prompt, params, images)
                yield requests
        except InvalidRequestError as error:
            raise body.in_request_terms(error) from None

    def _params(self, body: DiffusionFields) -> DiffusionParams:
        """What a body asks for; the name of an adapter in the place of the model's asks for that one too."""
        params = body.to_params(self._front_end.info)
        if body.model is None or body.model in self._model_names:
            return params
        return with_adapter(params, body.model)

    def _check_task(self, body: DiffusionFields, images: int) -> None:
        """Point a request that the model can't serve to the endpoint that can."""
        info = self._front_end.info
        if info.produces != self.produces:
            allowed = f"one that makes {self.produces}s: this one does {info.task}, at {endpoint_of(info)}"
            raise InvalidRequestError("model", self._model_name(body), allowed)
        check_image_count(images, info, self._front_end.limits)

    async def _read(self, read: Reader, body: DiffusionFields, files: Files) -> list[ImageInput]:
        """Each of the images, beside the event loop; one after the other, so that a client that leaves stops it."""
        if files is None:
            return []
        most = self._front_end.limits.max_input_pixels
        named = name_images(files, body.IMAGES)
        return [await in_thread(self._reader, read, image, name, most) for image, name in named]


async def in_thread(pool: Executor | None, function: Callable[..., T], *args: object) -> T:
    """What the function returns, called in a thread of the pool (None: of the event loop's own).

    Not through the future: asyncio's and the pool's know each other, so what they hold, here images, stays alive until
    the garbage collector finds the circle.
    """
    results: list[T] = []
    await asyncio.get_running_loop().run_in_executor(pool, lambda: results.append(function(*args)))
    return results.pop()


def count_files(files: Files) -> int:
    return len(files) if isinstance(files, list) else int(files is not None)


def endpoint_of(info: PipelineInfo) -> str:
    """Where requests to a model belong."""
    if info.produces == "video":
        return "/v1/videos"
    return "/v1/images/edits" if info.min_images else "/v1/images/generations"
