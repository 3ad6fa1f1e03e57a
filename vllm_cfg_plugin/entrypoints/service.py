"""What images and videos over HTTP share: from a body and its files to the engine's requests. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.entrypoints.engine_calls import EngineCalls
from vllm_cfg_plugin.entrypoints.fields import DiffusionFields
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd, check_model_name
from vllm_cfg_plugin.entrypoints.images.inputs import read_images
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.field_checks import check_image_count
from vllm_cfg_plugin.params import DiffusionRequest, ImageInput

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

    def _model_name(self, body: DiffusionFields) -> str:
        return body.model or self._model_names[0]

    async def _resolve(self, body: DiffusionFields, files: Files) -> list[DiffusionRequest]:
        """One engine request per result; whatever can be checked without decoding the images is checked before.

        Raises:
            InvalidRequestError, ModelNotFoundError: the request is wrong.
        """
        info = self._front_end.info
        check_model_name(body.model, self._model_names)
        body.check(info)
        try:
            self._check_task(body, count_files(files))
            images = await self._read_images(body, files)
            requests = self._front_end.resolve(body.prompt, body.to_params(info), images)
        except InvalidRequestError as error:
            raise body.in_request_terms(error) from None
        body.check_result(requests[0])
        return requests

    def _check_task(self, body: DiffusionFields, images: int) -> None:
        """Point a request that the model can't serve to the endpoint that can."""
        info = self._front_end.info
        if info.produces != self.produces:
            allowed = f"one that makes {self.produces}s: this one does {info.task}, at {endpoint_of(info)}"
            raise InvalidRequestError("model", self._model_name(body), allowed)
        check_image_count(images, info, self._front_end.limits)

    async def _read_images(self, body: DiffusionFields, files: Files) -> list[ImageInput]:
        """Decoded, but not on the event loop."""
        if files is None:
            return []
        return await asyncio.to_thread(read_images, files, body.IMAGES, self._front_end.limits.max_input_pixels)


def count_files(files: Files) -> int:
    return len(files) if isinstance(files, list) else int(files is not None)


def endpoint_of(info: PipelineInfo) -> str:
    """Where requests to a model belong."""
    if info.produces == "video":
        return "/v1/videos"
    return "/v1/images/edits" if info.min_images else "/v1/images/generations"
