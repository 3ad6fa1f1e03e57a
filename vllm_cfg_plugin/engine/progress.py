"""Denoising progress on a side channel: PUB in the engine, SUB in the caller.

A lost message costs a tick of a progress bar. Messages are msgpack `(progress_key, steps done, steps in all)`. The
subscriber binds, so that several engines (data parallel) can publish to one caller. Must not import vLLM or torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType

import msgspec
import zmq

_POLL_MS = 100

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[str, int, int]).decode


class ProgressPublisher:
    """Publishes to the caller that bound `address`; never blocks the engine."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    def publish(self, progress_key: str, done: int, steps: int) -> None:
        self._socket.send(_encode((progress_key, done, steps)), zmq.NOBLOCK)

    def close(self) -> None:
        self._context.destroy(linger=0)


class ProgressSubscriber:
    """Receives progress; use from one thread.

    Raises:
        zmq.ZMQError: somebody else listens at this address.
    """

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            self._socket.bind(address)
        except zmq.ZMQError:
            self.close()  # a context that is collected with an open socket waits for it for ever
            raise

    def poll(self, timeout_ms: int) -> Iterator[tuple[str, int, int]]:
        """Yield what has arrived, waiting at most `timeout_ms` for the first message."""
        while self._socket.poll(timeout_ms):
            yield _decode(self._socket.recv(zmq.NOBLOCK))
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
        on_progress: called in that thread with (progress key, steps done, steps in all).
    """

    def __init__(self, address: str, on_progress: Callable[[str, int, int], None]) -> None:
        self._address = address
        self._on_progress = on_progress
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
                for message in subscriber.poll(_POLL_MS):
                    self._on_progress(*message)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
