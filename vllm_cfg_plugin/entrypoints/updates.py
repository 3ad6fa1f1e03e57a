"""What the engine says of this API server's requests before they are done, on its event loop. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count

import numpy as np

from vllm_cfg_plugin.engine.progress import ProgressListener, Update
from vllm_cfg_plugin.engine.stats import EngineStats

# Called on the event loop with an update and, with a preview, its pixels: uint8 [number, height, width, channels].
Observer = Callable[[Update, np.ndarray | None], None]


class EngineUpdates:
    """Hands each update to whoever observes its request.

    Args:
        on_stats: called with the counts of an engine.

    Attributes:
        are_heard: whether there will be any.
    """

    def __init__(self, on_stats: Callable[[EngineStats], None]) -> None:
        self._on_stats = on_stats
        self.are_heard = False
        self._keys = count()
        self._observers: dict[str, Observer] = {}

    def listen(self, address: str) -> None:
        """Begin to hear; to be called on the event loop.

        Raises:
            zmq.ZMQError: somebody else listens at this address.
        """
        loop = asyncio.get_running_loop()

        def hand_over(update: Update, pixels: np.ndarray | None) -> None:
            with suppress(RuntimeError):  # the loop has ended, and this thread with it in a moment
                loop.call_soon_threadsafe(self._note, update, pixels)

        ProgressListener(address, hand_over).start()
        self.are_heard = True

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[str]:
        """The key under which a request's updates come to the observer, within this block; "" where none will."""
        if not self.are_heard:
            yield ""
            return
        key = str(next(self._keys))
        self._observers[key] = observer
        try:
            yield key
        finally:
            del self._observers[key]

    def _note(self, update: Update, pixels: np.ndarray | None) -> None:
        if isinstance(update, EngineStats):
            self._on_stats(update)
            return
        observer = self._observers.get(update.key)
        if observer is not None:  # whose request is not over
            observer(update, pixels)
