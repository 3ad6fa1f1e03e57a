"""The images of one request as server-sent events: previews while it runs, and each image when it is done.

Events are OpenAI's (`image_generation.*` and `image_edit.*`, as in openai-python's `types/image_*_event.py`); between
them come comments, which clients skip: how far the request is. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any

import msgspec
from pydantic import BaseModel

from vllm_cfg_plugin.engine.progress import Progress, Queued
from vllm_cfg_plugin.entrypoints.engine_calls import EngineCalls, PreviewImage
from vllm_cfg_plugin.entrypoints.front_end import GeneratedImage
from vllm_cfg_plugin.entrypoints.images.files import background_of, base64_file
from vllm_cfg_plugin.entrypoints.images.schema import EditsRequest, ImageFormat, ImagesRequest, Quality, Usage
from vllm_cfg_plugin.entrypoints.input_budget import InputHold
from vllm_cfg_plugin.entrypoints.service import in_thread
from vllm_cfg_plugin.params import DiffusionRequest

_COMMENT_SECONDS = 1.0  # at most one in that time, where something has changed
_SILENT_SECONDS = 10.0  # and one in this time whatever has: proxies end what is silent


ErrorBody = Callable[[Exception], dict[str, Any]]


class ImageEvent(BaseModel):
    """What both kinds of events say; `image_index` is ours: which of `n` images it is, from 0 up."""

    type: str
    b64_json: str
    created_at: int
    size: str
    quality: Quality
    background: str
    output_format: ImageFormat
    image_index: int


class PartialImageEvent(ImageEvent):
    """A preview; `partial_image_index` counts those of an image, from 0 up."""

    partial_image_index: int


class CompletedEvent(ImageEvent):
    """An image that is done; `seed` and `metrics` are ours."""

    usage: Usage
    seed: int
    metrics: dict[str, Any]


class ImageStream:
    """One request's events.

    Args:
        hold: of its input's memory, and of the pixels that wait to be sent.
        error_body: what clients are told of an error that ends the stream.
    """

    def __init__(
        self,
        calls: EngineCalls,
        body: ImagesRequest,
        requests: list[DiffusionRequest],
        request_id: str,
        hold: InputHold,
        error_body: ErrorBody,
    ) -> None:
        self._calls = calls
        self._body = body
        self._requests = requests
        self._hold = hold
        self._id = request_id
        self._error_body = error_body
        self._kind = "image_edit" if isinstance(body, EditsRequest) else "image_generation"
        self._created_at = int(time.time())
        # What is to be sent: comments, and images with their positions; None: there will be no more.
        self._queue: asyncio.Queue[str | tuple[int, PreviewImage | GeneratedImage] | None] = asyncio.Queue()
        self._ahead: dict[int, int] = {}  # of results that waited, how many came before them
        self._progress = [Progress("", 0, request.steps) for request in requests]
        self._queue.put_nowait(self._how_far())  # at once, so that a client knows that it was heard
        self._work = calls.start(requests, request_id, self._observe)
        self._ending = ExitStack()
        self._ending.enter_context(hold)
        self._ending.callback(self._work.cancel)

    def close(self) -> None:
        """Cancel what is not done; safe to call again."""
        self._ending.close()

    async def events(self) -> AsyncIterator[str]:
        """The stream's text, piece by piece, to its end."""
        finishing = asyncio.create_task(self._calls.finish(self._work, self._id))
        finishing.add_done_callback(lambda _: self._queue.put_nowait(None))
        telling = asyncio.create_task(self._tell_how_far())
        try:
            while (piece := await self._queue.get()) is not None:
                if isinstance(piece, str):
                    yield piece
                    continue
                yield await in_thread(None, self._event, *piece)
                self._hold.count(-piece[1].pixels.nbytes)
            await finishing
        except Exception as error:
            yield f"event: error\ndata: {json.dumps(self._error_body(error))}\n\n"
        finally:
            finishing.cancel()
            telling.cancel()

    async def _tell_how_far(self) -> None:
        """Comments, when there is something new and when there was silence for long."""
        told, told_at = self._how_far(), time.monotonic()
        while True:
            await asyncio.sleep(_COMMENT_SECONDS)
            comment = self._how_far()
            if comment != told or time.monotonic() - told_at > _SILENT_SECONDS:
                told, told_at = comment, time.monotonic()
                self._queue.put_nowait(comment)

    def _how_far(self) -> str:
        done, steps = sum(p.done for p in self._progress), sum(p.steps for p in self._progress)
        if not done and self._ahead:
            return f": queued behind {min(self._ahead.values())}\n\n"
        return f": step {done} of {steps}\n\n"

    def _observe(self, index: int, update: Progress | Queued | PreviewImage | GeneratedImage) -> None:
        if isinstance(update, Queued):
            self._ahead[index] = update.ahead
        elif isinstance(update, Progress):
            self._progress[index] = update
        else:
            self._hold.count(update.pixels.nbytes)
            self._queue.put_nowait((index, update))

    def _event(self, index: int, image: PreviewImage | GeneratedImage) -> str:
        """An event's text; encodes a file, which takes long enough to be kept off the event loop."""
        request, pixels = self._requests[index], image.pixels[0]
        common: dict[str, Any] = {
            "b64_json": base64_file(pixels, self._body),
            "created_at": self._created_at,
            "size": f"{request.width}x{request.height}",
            "quality": self._body.quality_name,
            "background": background_of(pixels),
            "output_format": self._body.format,
            "image_index": index,
        }
        event: ImageEvent
        if isinstance(image, PreviewImage):
            event = PartialImageEvent(type=f"{self._kind}.partial_image", partial_image_index=image.index, **common)
        else:
            event = CompletedEvent(
                type=f"{self._kind}.completed",
                usage=Usage.of(sum(request.text_tokens), request.condition_tokens, request.image_tokens),
                seed=image.metrics.seed,
                metrics=msgspec.structs.asdict(image.metrics),
                **common,
            )
        return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"
