"""What the engine tells of requests before they are done, steps and previews: not on vLLM's output path, but beside it.

PUSH in the engine, PULL in the caller. A caller binds an address of its own, so several engines (data parallel) may
push to one caller, and each of several API servers hears of its own requests. An update that the caller does not take
is dropped: it costs a tick of a progress bar, or a preview. Must not import vLLM or torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import zmq

from vllm_cfg_plugin.engine.stats import EngineStats

_POLL_MS = 100


class Progress(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Denoising steps that a request has done, of all; `key` is its `progress_key`."""

    key: str
    done: int
    steps: int


class Queued(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A request waits; so many came before it and wait too. Shorter ones may overtake it, a bounded number of times."""

    key: str
    ahead: int


class Preview(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Preview number `index`, from 0 up, of a request; its pixels follow, of `shape` as in a side report."""

    key: str
    index: int
    shape: tuple[int, ...]


Update = Progress | Queued | Preview | EngineStats
# An update and, with a preview, its pixels: uint8 [number, height, width, channels].
OnUpdate = Callable[[Update, np.ndarray | None], None]

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Update).decode


def address_of_client(prefix: str, client_index: int) -> str:
    """Where one of several API servers hears of its requests; offline use is the first."""
    return f"{prefix}-{client_index}"


class ProgressPublisher:
    """Sends to the callers that bound addresses with this `prefix`; never blocks the engine."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._context = zmq.Context()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}

    def publish(self, client_index: int, update: Update, pixels: memoryview | None = None) -> None:
        """Send an update to the caller of this number, with the pixels of a preview."""
        frames: list[Any] = [_encode(update)] if pixels is None else [_encode(update), pixels]
        with suppress(zmq.Again):  # nobody reads them
            self._socket(client_index).send_multipart(frames, zmq.NOBLOCK)

    def _socket(self, client_index: int) -> zmq.Socket[bytes]:
        if client_index not in self._sockets:
            socket = self._sockets[client_index] = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(address_of_client(self._prefix, client_index))
        return self._sockets[client_index]

    def close(self) -> None:
        self._context.destroy(linger=0)


class ProgressSubscriber:
    """Receives updates; use from one thread.

    Raises:
        zmq.ZMQError: somebody else listens at this address.
    """

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        try:
            self._socket.bind(address)
        except zmq.ZMQError:
            self.close()  # a context that is collected with an open socket waits for it for ever
            raise

    def poll(self, timeout_ms: int) -> Iterator[tuple[Update, np.ndarray | None]]:
        """Yield what has arrived, waiting at most `timeout_ms` for the first message."""
        while self._socket.poll(timeout_ms):
            head, *pixels = self._socket.recv_multipart(zmq.NOBLOCK)
            update = _decode(head)
            has_pixels = isinstance(update, Preview) and pixels
            yield update, np.frombuffer(pixels[0], np.uint8).reshape(update.shape) if has_pixels else None
            timeout_ms = 0

    def close(self) -> None:
        self._context.destroy(linger=0)

    def __enter__(self) -> ProgressSubscriber:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ProgressListener:
    """A thread that hands on what arrives.

    Args:
        on_update: called in that thread.
    """

    def __init__(self, address: str, on_update: OnUpdate) -> None:
        self._address = address
        self._on_update = on_update
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin to listen.

        Raises:
            zmq.ZMQError: somebody else listens at this address.
        """
        subscriber = ProgressSubscriber(self._address)  # the thread's alone from now on
        self._thread = threading.Thread(target=self._listen, args=(subscriber,), name="denoising-progress", daemon=True)
        self._thread.start()

    def _listen(self, subscriber: ProgressSubscriber) -> None:
        with subscriber:
            while not self._stop.is_set():
                for update, pixels in subscriber.poll(_POLL_MS):
                    self._on_update(update, pixels)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
