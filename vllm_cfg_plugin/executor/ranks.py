"""An engine's ranks for as long as the engine lives: when one of them dies or hangs, all are started anew.

Everything that a rank knows follows from the requests, so nothing is lost that can't be computed again; the scheduler
has its requests begin again. An *epoch* is the number of the start: what was sent in one epoch is never answered in
another.
"""

from __future__ import annotations

import multiprocessing.connection
import multiprocessing.util
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from vllm_cfg_plugin.errors import ConfigurationError, RankDiedError
from vllm_cfg_plugin.executor.rank_pool import PendingAnswer, RankPool
from vllm_cfg_plugin.executor.restarts import RestartLimit
from vllm_cfg_plugin.logs import get_logger

logger = get_logger(__name__)

_LOOK_SECONDS = 1.0  # then look again whom to watch: after a restart there are other processes


class Ranks:
    """The present pool of ranks.

    Args:
        make_pool: starts ranks.
        limit: how often that may happen again.

    Attributes:
        pool: of the present epoch.
        epoch: 0 for the first start.
        is_trial: they work on a request that they may die of; that is no reason for the engine to give up.
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
        self.is_trial = False
        self.is_restarting = False
        self.is_asleep = False
        self._closing = threading.Event()
        # Also when the engine's process ends without a call of close(): multiprocessing then ends its children, and
        # nobody must start them anew.
        multiprocessing.util.Finalize(self, self._closing.set, exitpriority=1)
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
        try:
            self._start_anew(why)
        except (RankDiedError, ConfigurationError):
            self._closing.set()  # nobody tries again
            raise
        self.epoch += 1
        self.is_restarting = False
        logger.warning(
            "The cfg ranks were started anew in %.1f s; the requests that they had begin again",
            time.monotonic() - began,
        )

    def _start_anew(self, why: RankDiedError) -> None:
        logger.error("%s", _sentence(why))
        if not self.is_trial:
            self._limit.note(why)
        self.pool.kill()
        while True:
            try:
                self.pool = self._make_pool()
                return
            except RankDiedError as error:
                logger.error("%s", _sentence(error))
                self._limit.note(error)

    def sleep(self) -> None:
        """End the ranks until `wake_up`, which frees all that they hold; what was due is not answered."""
        with self.lock:
            self.is_asleep = True
            self.epoch += 1
            self.pool.kill()

    def wake_up(self) -> None:
        """Start ranks again.

        Raises:
            ConfigurationError, RankDiedError: they could not start; says why.
        """
        with self.lock:
            self.pool = self._make_pool()
            self.is_asleep = False

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Restart ranks that die while the engine is idle, from a thread; `on_failure` is told why they can't be."""
        arguments = (weakref.ref(self), self._closing, on_failure)
        threading.Thread(target=_watch, args=arguments, daemon=True, name="cfg-rank-monitor").start()

    @property
    def sentinels(self) -> list[Any]:
        """What is ready when a rank may have ended; empty where there is none."""
        with self.lock:
            return [] if self.is_asleep or self._closing.is_set() else self.pool.processes.sentinels

    def heal(self) -> Exception | None:
        """Have dead ranks started anew; returns why they can't be."""
        # While the engine's thread waits for ranks it has the lock, and notices their death by itself.
        with self.lock:
            try:
                if not self._closing.is_set() and not self.is_asleep:
                    self.pool.check_health()
            except RankDiedError as death:
                try:
                    self.restart(death)
                except (RankDiedError, ConfigurationError) as error:
                    return error
        return None

    def close(self) -> None:
        self._closing.set()
        with self.lock:
            self.pool.close()


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


def _watch(watched: weakref.ref[Ranks], closing: threading.Event, on_failure: Callable[[Exception], None]) -> None:
    while not closing.is_set():
        ranks = watched()
        if ranks is None:
            return
        sentinels = ranks.sentinels
        del ranks  # this thread must not keep them alive
        multiprocessing.connection.wait(sentinels, _LOOK_SECONDS)
        ranks = watched()
        if ranks is not None and (error := ranks.heal()):
            on_failure(error)
            return
        del ranks
