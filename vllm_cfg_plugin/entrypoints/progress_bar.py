"""A progress bar over the denoising steps of one offline call; must not import vLLM or torch."""

from __future__ import annotations

import threading
from types import TracebackType

from tqdm import tqdm

from vllm_cfg_plugin.engine.progress import ProgressSubscriber

_POLL_MS = 100


class StepBar:
    """Context manager that shows steps done while the caller's thread waits for the engine.

    Args:
        address: where the engine publishes progress; empty: it does not, and the bar moves by `finish` alone.
        steps: progress key -> denoising steps of that request.
    """

    def __init__(self, address: str, steps: dict[str, int]) -> None:
        self._address = address
        self._steps = steps
        self._done = dict.fromkeys(steps, 0)
        self._bar = tqdm(total=sum(steps.values()), desc="Denoising", unit="step", dynamic_ncols=True)
        self._lock = threading.Lock()  # the listener and `finish` both move the bar
        self._stop = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="denoising-progress", daemon=True)

    def finish(self, key: str) -> None:
        """The request has ended, however it did; progress messages may have been lost."""
        self._move(key, self._steps[key])

    def _move(self, key: str, done: int) -> None:
        with self._lock:
            advance = done - self._done.get(key, done)  # a straggler of an earlier call has an unknown key
            if advance > 0:
                self._done[key] = done
                self._bar.update(advance)

    def _listen(self) -> None:
        with ProgressSubscriber(self._address) as subscriber:
            while not self._stop.is_set():
                for key, done, _ in subscriber.poll(_POLL_MS):
                    self._move(key, done)

    def __enter__(self) -> StepBar:
        if self._address:
            self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._address:
            self._listener.join()
        self._bar.close()
