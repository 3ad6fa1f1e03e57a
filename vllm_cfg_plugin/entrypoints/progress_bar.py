"""A progress bar over the denoising steps of one offline call; must not import vLLM or torch."""

from __future__ import annotations

import threading
from types import TracebackType

from tqdm import tqdm

from vllm_cfg_plugin.engine.progress import Progress, ProgressListener, Update, address_of_client


class StepBar:
    """Context manager that shows steps done while the caller's thread waits for the engine.

    Args:
        address: where the engine publishes progress, before the number of the caller; empty: it does not, and the bar
            moves by `finish` alone.
        steps: progress key -> denoising steps of that request.
    """

    def __init__(self, address: str, steps: dict[str, int]) -> None:
        self._steps = steps
        self._done = dict.fromkeys(steps, 0)
        self._bar = tqdm(total=sum(steps.values()), desc="Denoising", unit="step", dynamic_ncols=True)
        self._lock = threading.Lock()  # the listener and `finish` both move the bar
        self._listener = ProgressListener(address_of_client(address, 0), self._note) if address else None

    def finish(self, key: str) -> None:
        """The request has ended, however it did; progress messages may have been lost."""
        self._move(key, self._steps[key])

    def _note(self, update: Update, _: object) -> None:
        if isinstance(update, Progress):
            self._move(update.key, update.done)

    def _move(self, key: str, done: int) -> None:
        with self._lock:
            advance = done - self._done.get(key, done)  # a straggler of an earlier call has an unknown key
            if advance > 0:
                self._done[key] = done
                self._bar.update(advance)

    def __enter__(self) -> StepBar:
        if self._listener is not None:
            self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listener is not None:
            self._listener.close()
        self._bar.close()
