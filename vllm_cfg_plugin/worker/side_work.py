"""Text encodings and decodes beside the step loop: threads of their own that yield the rank's core to the steps.

An encode or a decode can take as long as many steps, and inside a step all ranks would wait for it. So each kind has a
thread, of a lower priority than the thread that steps: it runs while that one waits (for the other ranks, or for a
plan) and gets a small share of the core otherwise. On an accelerator it queues its kernels on a stream of its own.
Must not import vLLM.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch

from vllm_cfg_plugin.engine.plan import DECODED, SideReport
from vllm_cfg_plugin.logs import get_logger

logger = get_logger(__name__)

# On Linux threads of niceness 0, 2 and 5 weigh 1024, 655 and 335. So where all three want the core the steps get half
# of it. Encodes weigh more, because the sooner a request may step, the fuller are the packs.
_ENCODE_NICENESS = 2
_DECODE_NICENESS = 5

# Sends a report and, after a decode, its pixels: uint8 [number, height, width, channels]. Called on the threads of this
# module.
Deliver = Callable[[SideReport, torch.Tensor | None], None]


class SideWork:
    """The encodes and decodes of one rank.

    Attributes:
        deliver: where reports go; set before the first piece of work comes.
    """

    deliver: Deliver

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._encoder = SideThread("cfg-encode", device, _ENCODE_NICENESS)
        self._decoder = SideThread("cfg-decode", device, _DECODE_NICENESS)
        self._queued: dict[int, list[Future[None]]] = {}

    def encode(self, id: int, branch: int, work: Callable[[], None]) -> None:
        """Run `work`, which encodes branch `branch` of request `id`, and report."""
        self._submit(self._encoder, id, branch, "encoding its prompt", work)

    def decode(self, id: int, work: Callable[[], torch.Tensor]) -> None:
        """Run `work`, which decodes request `id` to uint8 [number, height, width, channels] on the CPU, and report."""
        self._submit(self._decoder, id, DECODED, "decoding its image", work)

    def cancel(self, id: int) -> None:
        """Drop what has not begun of a request; the report of what has begun comes all the same."""
        for future in self._queued.pop(id, ()):
            future.cancel()

    def close(self) -> None:
        for thread in (self._encoder, self._decoder):
            thread.close()

    def _submit(
        self, thread: SideThread, id: int, branch: int, doing: str, work: Callable[[], torch.Tensor | None]
    ) -> None:
        # Filled in place: a short decode may have ended, and forgotten its list, before the next line is done.
        self._queued.setdefault(id, []).append(thread.submit(self._run, id, branch, doing, work, thread))

    def _run(
        self, id: int, branch: int, doing: str, work: Callable[[], torch.Tensor | None], thread: SideThread
    ) -> None:
        began = time.monotonic()
        if branch == DECODED:
            self._queued.pop(id, None)
        try:
            pixels = work()
            thread.synchronize()
        except Exception as error:
            logger.error("A request failed while %s", doing, exc_info=error)
            message = f"failed while {doing}: {type(error).__name__}: {error}"
            self.deliver(SideReport(id, branch, self._rank, 0.0, message), None)
            return
        shape = () if pixels is None else tuple(pixels.shape)
        milliseconds = 1e3 * (time.monotonic() - began)
        self.deliver(SideReport(id, branch, self._rank, milliseconds, "", shape), pixels)


class SideThread:
    """One thread that runs what it is given, in order, at a lower priority and on its own stream."""

    def __init__(self, name: str, device: torch.device, niceness: int) -> None:
        self._niceness = niceness
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, name, self._prepare)

    def submit(self, run: Callable[..., None], *args: object) -> Future[None]:
        ready = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        return self._pool.submit(self._on_stream, ready, run, args)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self) -> None:
        if self._device.type == "cpu":
            # As in the stepping thread: with more, a result depends on how the work was split.
            torch.set_num_threads(1)
        if sys.platform == "linux":  # elsewhere a priority belongs to the process
            os.nice(self._niceness)  # from where the stepping thread is: a process may have been started with `nice`

    def synchronize(self) -> None:
        """Wait, on this thread, until what it queued on its stream is done."""
        if self._stream is not None:
            self._stream.synchronize()

    @torch.inference_mode()
    def _on_stream(self, ready: torch.cuda.Event | None, run: Callable[..., None], args: tuple[object, ...]) -> None:
        """Run on the side stream, after what the stepping thread had queued when it submitted this."""
        context: AbstractContextManager[object] = nullcontext()
        if self._stream is not None and ready is not None:
            self._stream.wait_event(ready)
            context = torch.cuda.stream(self._stream)
        with context:
            run(*args)
