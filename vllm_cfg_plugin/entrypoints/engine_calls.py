"""Runs the engine requests of one user's request together: what images and videos over HTTP share. Knows no HTTP.

n results are n engine requests that run at once; when one fails, or the caller is cancelled, the others are aborted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from vllm.exceptions import GracefulHTTPError, QueueOverflowError, RetryableRequestError
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.engine.progress import Preview, Progress, Queued, Update
from vllm_cfg_plugin.entrypoints import metrics
from vllm_cfg_plugin.entrypoints.front_end import GeneratedImage, pooling_params, read_output
from vllm_cfg_plugin.entrypoints.tracing import trace_headers
from vllm_cfg_plugin.entrypoints.updates import EngineUpdates
from vllm_cfg_plugin.errors import InvalidRequestError, RequestAbortedError, ServerBusyError
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.model import PLACEHOLDER_PROMPT
from vllm_cfg_plugin.params import DiffusionRequest

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = get_logger(__name__)

_SHUTDOWN_POLL_S = 0.5
_DRAIN_POLL_S = 0.1
_FLAG = "--max-num-queued-reqs"

Work = asyncio.Task[list[GeneratedImage]]


@dataclass(frozen=True)
class PreviewImage:
    """What a request that is not done is heading for: its preview number `index`, pixels as of a `GeneratedImage`."""

    index: int
    pixels: np.ndarray


# Called with the position of a request among those that were started together, and what is known of it.
Observe = Callable[[int, Progress | Queued | PreviewImage | GeneratedImage], None]


class EngineCalls:
    """One engine, as the services of an API server call it.

    Args:
        is_stopping: whether the server has begun to shut down.

    Attributes:
        updates: of requests that run.
        predict: seconds that a request will take on an engine of its own, where that is known.
    """

    def __init__(self, engine: EngineClient, is_stopping: Callable[[], bool]) -> None:
        self._engine = engine
        self.updates = EngineUpdates(metrics.note_engine)
        self.predict: Callable[[DiffusionRequest], float | None] = lambda request: None
        self._works: set[Work] = set()  # that are not done
        self._is_draining = False
        self._is_stopping = is_stopping
        self._promised = 0  # places in the engine's queue of requests that it does not count yet

    def check_room(self, count: int = 1) -> None:
        """Whether the engine's queue has room for so many requests more.

        Raises:
            ServerBusyError: it has not, as `--max-num-queued-reqs` says.
            InvalidRequestError: it never has.
            RequestAbortedError: the server drains.
        """
        if self._is_draining:
            raise RequestAbortedError("the server is shutting down and takes no new requests")
        most = self._engine.vllm_config.scheduler_config.max_num_queued_reqs
        if most is not None and count > most:
            raise InvalidRequestError("n", count, f"at most {most}: no more may wait on this server ({_FLAG})")
        try:
            self._engine.check_admission(self._promised + count)
        except GracefulHTTPError as error:
            raise _queue_is_full() from error

    def drain(self, seconds: float) -> None:
        """Take no new requests, and wait so long for those that run; called on a thread of its own."""
        self._is_draining = True
        deadline = time.monotonic() + seconds
        while self._works and time.monotonic() < deadline:
            time.sleep(_DRAIN_POLL_S)

    @contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """Keep room in the engine's queue for so many requests, which `start` begins at the end of the block.

        Raises:
            ServerBusyError: as `check_room`.
        """
        self.check_room(count)
        self._promised += count
        try:
            yield
        finally:
            # Not at once: the engine counts them itself when the loop has run their first steps.
            asyncio.get_running_loop().call_soon(self._give_back, count)

    def _give_back(self, count: int) -> None:
        self._promised -= count

    def start(self, requests: list[DiffusionRequest], request_id: str, observe: Observe | None = None) -> Work:
        """Hand all requests to the engine, whose queue has `room_for` them.

        Args:
            observe: told of each request's steps, previews and result, as they come.
        """
        tasks = [
            asyncio.create_task(self._run_observed(index, request, f"{request_id}-{index}", observe))
            for index, request in enumerate(requests)
        ]
        work = asyncio.create_task(_all_results(tasks))
        self._works.add(work)
        work.add_done_callback(self._works.discard)
        work.add_done_callback(lambda _: [task.cancel() for task in tasks])
        return work

    async def finish(self, work: Work, request_id: str) -> list[GeneratedImage]:
        """The results of `start`, in the order of their requests.

        Raises:
            RequestFailedError: one of them failed.
            ServerBusyError: another API server took the place in the queue.
            RequestAbortedError: the server or the engine stopped first.
            vllm's EngineDeadError: the engine died.
        """
        try:
            return await self._unless_stopping(work, request_id)
        finally:
            work.cancel()

    async def _unless_stopping(self, work: Work, request_id: str) -> list[GeneratedImage]:
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

    async def _run_observed(
        self, index: int, request: DiffusionRequest, request_id: str, observe: Observe | None
    ) -> GeneratedImage:
        if observe is None:
            return await self._run_one(request, request_id)

        def note(update: Update, pixels: np.ndarray | None) -> None:
            if isinstance(update, (Progress, Queued)):
                observe(index, update)
            elif pixels is not None and isinstance(update, Preview):
                metrics.note_preview()
                observe(index, PreviewImage(update.index, pixels))

        with self.updates.observed(note) as key:
            image = await self._run_one(msgspec.structs.replace(request, progress_key=key), request_id)
        observe(index, image)
        return image

    async def _run_one(self, request: DiffusionRequest, request_id: str) -> GeneratedImage:
        started = time.perf_counter()
        with metrics.counted_failures():
            image = await self._finished(request, request_id, started)
        metrics.note_done(image.metrics, self.predict(request))
        logger.info("%s", _summary(request, request_id, image.metrics))
        return image

    async def _finished(self, request: DiffusionRequest, request_id: str, started: float) -> GeneratedImage:
        answer, params = None, pooling_params(request)
        try:
            async for output in self._engine.encode(
                PLACEHOLDER_PROMPT, params, request_id, trace_headers=trace_headers()
            ):
                answer = output
        except QueueOverflowError as error:
            raise _queue_is_full() from error
        except RetryableRequestError as error:  # the engine is paused
            raise RequestAbortedError(f"request {request_id} was not started: {error}") from error
        if answer is None:
            raise RequestAbortedError(f"request {request_id} was aborted: the engine gave no answer")
        return read_output(answer, 1000 * (time.perf_counter() - started))


async def _all_results(tasks: Sequence[asyncio.Task[GeneratedImage]]) -> list[GeneratedImage]:
    """Those of all tasks; a failure or a cancellation cancels, and so aborts, the others."""
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failures = [task for task in tasks if task in done and task.exception()]
        return [task.result() for task in failures or tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _summary(request: DiffusionRequest, request_id: str, taken: RequestMetrics) -> str:
    """A finished result in one line."""
    frames = f", {request.num_frames} frames" if request.num_frames > 1 else ""
    guided = "guided" if request.guided else "not guided"
    seconds = f"queue {taken.queue_ms / 1e3:.2f}, denoise {taken.denoise_ms / 1e3:.2f}"
    return (
        f"{request_id}: {request.width}x{request.height}{frames}, {taken.steps} steps, {guided}, "
        f"seed {taken.seed}: {taken.e2e_time_ms / 1e3:.2f} s ({seconds})"
    )


def _queue_is_full() -> ServerBusyError:
    return ServerBusyError(
        f"the queue is full: with this request more results would be made or wait than {_FLAG} allows; try again later"
    )


def _shutting_down(request_id: str) -> RequestAbortedError:
    return RequestAbortedError(f"request {request_id} was aborted: the server is shutting down")
