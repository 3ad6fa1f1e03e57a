"""Work beside the step loop: threads of their own that yield the rank's core to the steps.

An encode or a decode can take as long as many steps, and inside a step all ranks would wait for it; so can a forward
of a long request. So each kind has a thread, of a lower priority than the thread that steps: it runs while that one
waits (for the other ranks, or for a plan) and gets a small share of the core otherwise. What is long has threads of
its own, of the lowest priority, so that no short work stands in line behind it; and it stops when it is cancelled.
Previews have a thread beside that of decodes, so that no image waits for another one's preview. On an accelerator each
thread queues its kernels on a stream of its own. Must not import vLLM.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode

from vllm_cfg_plugin.distributed.sequence_group import ALONE, GroupBrokenError, SequenceGroup
from vllm_cfg_plugin.engine.plan import DECODED, FORWARDED, KEPT, PREVIEWED, SideReport
from vllm_cfg_plugin.errors import InputsRefusedError
from vllm_cfg_plugin.logs import get_logger

logger = get_logger(__name__)

# On Linux threads of niceness 0, 2, 5 and 10 weigh 1024, 655, 335 and 110. So where the first three want the core the
# steps get half of it. Encodes weigh more, because the sooner a request may step, the fuller are the packs.
_ENCODE_NICENESS = 2
_DECODE_NICENESS = 5
_LONG_NICENESS = 10

# Sends a report and, after a decode, its pixels: uint8 [number, height, width, channels]; or what is kept of a request
# or shared of an encode: uint8 [bytes].
Deliver = Callable[[SideReport, torch.Tensor | None], None]


@dataclass(eq=False)
class _Work:
    """A piece of work of one request; `branch` as in its report.

    Attributes:
        group: whose ranks do it together.
    """

    id: int
    branch: int
    doing: str
    run: Callable[[], torch.Tensor | None]
    group: SequenceGroup = ALONE
    is_cancelled: bool = False

    def run_or_skip(self) -> torch.Tensor | None:
        if not self.is_cancelled or not self.group.is_stoppable:
            return self.run()
        self.group.fail()  # the others may be at it
        return None


class SideWork:
    """The encodes, decodes, previews and long forwards of one rank.

    Attributes:
        deliver: where reports go; set before the first piece of work comes.
    """

    deliver: Deliver

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._encoder = SideThread("cfg-encode", device, _ENCODE_NICENESS)
        self._decoder = SideThread("cfg-decode", device, _DECODE_NICENESS)
        self._long_coder = SideThread("cfg-long-code", device, _LONG_NICENESS)
        self._forwarder = SideThread("cfg-forward", device, _LONG_NICENESS)
        self._previewer = SideThread("cfg-preview", device, _DECODE_NICENESS)
        self._preparer = None if device.type == "cpu" else SideThread("cfg-prepare", device, _ENCODE_NICENESS)
        self._works: set[_Work] = set()
        self._lock = threading.Lock()

    def encode(self, id: int, branch: int, run: Callable[[], torch.Tensor | None], is_long: bool = False) -> None:
        """Call `run`, which encodes branch `branch` of request `id`, and report, with what it returns to be shared."""
        self._submit(self._long_coder if is_long else self._encoder, _Work(id, branch, "encoding its prompt", run))

    def decode(self, id: int, run: Callable[[], torch.Tensor], is_long: bool = False) -> None:
        """Call `run`, which decodes request `id` to uint8 [number, height, width, channels] on the CPU, and report."""
        self._submit(self._long_coder if is_long else self._decoder, _Work(id, DECODED, "decoding its image", run))

    def preview(self, id: int, run: Callable[[], torch.Tensor], is_long: bool = False) -> None:
        """Call `run`, which decodes what request `id` is heading for as `decode` does, and report."""
        self._submit(self._long_coder if is_long else self._previewer, _Work(id, PREVIEWED, "making a preview", run))

    def forward(self, id: int, run: Callable[[], None], group: SequenceGroup = ALONE) -> None:
        """Call `run`, which forwards this rank's branches of long request `id` together with `group`, and report."""
        self._submit(self._forwarder, _Work(id, FORWARDED, "predicting its noise", run, group))

    def keep(self, id: int, steps: int, run: Callable[[], torch.Tensor]) -> None:
        """Call `run`, which gives what lets request `id` go on after so many steps, and report; or warn if it fails."""
        self._encoder.submit(self._keep, id, steps, run)

    def prepare(self, run: Callable[[], None]) -> Future[None]:
        """Call `run`, which makes a request ready for its first step: here and now, where nobody waits for copies."""
        if self._preparer is not None:
            return self._preparer.submit(self._prepare, run)
        return run_now(run)

    def _keep(self, id: int, steps: int, run: Callable[[], torch.Tensor]) -> None:
        try:
            kept = run()
        except Exception as error:
            logger.warning("A video would begin again after a restart, as it can't be kept: %s", error)
            return
        self.deliver(SideReport(id, KEPT, self._rank, 0.0, "", (steps,)), kept)

    def _prepare(self, run: Callable[[], None]) -> None:
        run()
        if self._preparer is not None:
            self._preparer.synchronize()

    def cancel(self, id: int) -> None:
        """Drop a request's work: what has not begun never does, what is long stops, and there is no report of it."""
        with self._lock:
            for work in self._works:
                work.is_cancelled |= work.id == id

    def close(self) -> None:
        with self._lock:
            for work in self._works:
                work.is_cancelled = True
        for thread in (self._encoder, self._decoder, self._preparer, *self._stoppable):
            if thread is not None:
                thread.close()

    @property
    def _stoppable(self) -> tuple[SideThread, ...]:
        """Whose work stops when it is cancelled: it may take long, or its request is done."""
        return self._long_coder, self._forwarder, self._previewer

    def _submit(self, thread: SideThread, work: _Work) -> None:
        with self._lock:
            self._works.add(work)
        thread.submit(self._run, thread, work)

    def _run(self, thread: SideThread, work: _Work) -> None:
        began = time.monotonic()
        pixels, message, is_refused = None, "", False
        try:
            may_stop = thread in self._stoppable and work.group.is_stoppable
            with _StopWhenCancelled(work) if may_stop else nullcontext():
                pixels = work.run_or_skip()
            thread.synchronize()
        except _Cancelled:
            logger.debug("Request %d left while %s", work.id, work.doing)
        except GroupBrokenError as error:
            end_rank(error)
        except InputsRefusedError as error:
            message, is_refused = str(error), True
        except Exception as error:
            logger.error("A request failed while %s", work.doing, exc_info=error)
            message = f"failed while {work.doing}: {type(error).__name__}: {error}"
        with self._lock:
            self._works.remove(work)
        if work.is_cancelled:
            return
        milliseconds = 0.0 if message else 1e3 * (time.monotonic() - began)
        shape = () if pixels is None else tuple(pixels.shape)
        self.deliver(SideReport(work.id, work.branch, self._rank, milliseconds, message, shape, is_refused), pixels)


def end_rank(why: GroupBrokenError) -> NoReturn:
    """End this process, at once: all ranks are started anew then."""
    logger.critical("%s: this rank ends", why)
    os._exit(1)


def run_now(run: Callable[[], None]) -> Future[None]:
    """The outcome of a call."""
    done: Future[None] = Future()
    try:
        run()
        done.set_result(None)
    except Exception as error:
        done.set_exception(error)
    return done


class _Cancelled(BaseException):
    """Ends a piece of work; no `Exception`, so that nothing below takes it for a failure of its own."""


class _StopWhenCancelled(TorchFunctionMode):
    """Within it this thread's next torch function raises `_Cancelled` once its work is cancelled.

    It changes no bit. It costs 2 us a function, some percent of a forward of a second: short work goes without.
    """

    def __init__(self, work: _Work) -> None:
        super().__init__()
        self._work = work

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._work.is_cancelled:
            raise _Cancelled
        return func(*args, **(kwargs or {}))


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
