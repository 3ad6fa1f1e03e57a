"""An engine's ranks for as long as the engine lives: when one of them dies or hangs, all are started anew.

Everything that a rank knows follows from the requests, so nothing is lost that can't be computed again; the scheduler
has its requests begin again. An *epoch* is the number of the start: what was sent in one epoch is never answered in
another.
"""

from __future__ import annotations

import multiprocessing.connection
import threading
import time
from collections.abc import Callable
from typing import Any

from vllm_cfg_plugin.errors import ConfigurationError, RankDiedError
from vllm_cfg_plugin.executor.rank_pool import PendingAnswer, RankPool
from vllm_cfg_plugin.executor.restarts import RestartLimit
from vllm_cfg_plugin.logs import get_logger

logger = get_logger(__name__)

_IDLE_LOOK_SECONDS = 1.0


class Ranks:
    """The present pool of ranks.

    Args:
        make_pool: starts ranks.
        limit: how often that may happen again.

    Attributes:
        pool: of the present epoch.
        epoch: 0 for the first start.
        lock: held by whoever uses the pool, the engine's thread or the one that watches; it may be taken again by the
            thread that has it.

    Raises:
        ConfigurationError, RankDiedError: the ranks could not start; says why.
    """

    def __init__(self, make_pool: Callable[[], RankPool], limit: RestartLimit) -> None:
        self._make_pool = make_pool
        self._limit = limit
        self.epoch = 0
        self.lock = threading.RLock()
        self._closing = threading.Event()
        self.is_restarting = False
        self.pool = make_pool()

    def answer(self, pending: PendingAnswer, epoch: int, timeout: float | None = None) -> Any:
        """What the ranks answer; None if they were started anew before they did.

        Raises:
            RankDiedError: they died and can't be started anew.
        """
        with self.lock:
            if pending.done() or epoch == self.epoch:
                try:
                    return pending.result(timeout)
                except RankDiedError as error:
                    self.restart(error)
            return None

    def restart(self, why: RankDiedError) -> None:
        """Start all ranks anew; the caller holds the lock.

        Raises:
            RankDiedError: there were too many restarts.
            ConfigurationError: the ranks can't be started any more; says why.
        """
        began = time.monotonic()
        self.is_restarting = True
        while True:
            logger.error("%s", _sentence(why))
            self._limit.note(why)
            self.pool.kill()
            try:
                self.pool = self._make_pool()
                break
            except RankDiedError as error:
                why = error
        self.epoch += 1
        self.is_restarting = False
        logger.warning(
            "The cfg ranks were started anew in %.1f s; the requests that they had begin again",
            time.monotonic() - began,
        )

    def watch(self, on_failure: Callable[[], None]) -> None:
        """Restart ranks that die while the engine is idle, from a thread; `on_failure` if they can't be."""
        threading.Thread(target=self._watch, args=(on_failure,), daemon=True, name="cfg-rank-monitor").start()

    def _watch(self, on_failure: Callable[[], None]) -> None:
        while not self._closing.is_set():
            multiprocessing.connection.wait(self.pool.processes.sentinels, _IDLE_LOOK_SECONDS)
            # While the engine's thread waits for the ranks it has the lock, and notices by itself.
            with self.lock:
                if self._closing.is_set():
                    return
                try:
                    self.pool.check_health()
                    continue
                except RankDiedError as error:
                    failed = self._try_restart(error)
            if failed:
                on_failure()
                return

    def _try_restart(self, why: RankDiedError) -> bool:
        try:
            self.restart(why)
        except (RankDiedError, ConfigurationError) as error:
            logger.error("%s", _sentence(error))
            return True
        return False

    def close(self) -> None:
        self._closing.set()
        with self.lock:
            self.pool.close()


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]
