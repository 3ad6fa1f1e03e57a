"""Ranks that die are started anew, within a limit, by whoever notices: the engine's thread or the one that watches."""

import gc
import os
import threading
import weakref

import pytest

from vllm_cfg_plugin.engine.step_result import StepResult
from vllm_cfg_plugin.errors import ConfigurationError, RankDiedError
from vllm_cfg_plugin.executor.answers import PlanAnswer
from vllm_cfg_plugin.executor.ranks import Ranks
from vllm_cfg_plugin.executor.restarts import WINDOW_SECONDS, RestartLimit


class FakeProcesses:
    """Their sentinel is ready once they are dead."""

    def __init__(self):
        self.reader, self._writer = os.pipe()
        self.sentinels = [self.reader]

    def die(self):
        os.close(self._writer)


class FakePool:
    def __init__(self):
        self.processes = FakeProcesses()
        self.ended = ""
        self.is_gone = False

    def die(self, how="rank 0 ended"):
        self.ended = how
        self.processes.die()

    def check_health(self):
        if self.ended:
            raise RankDiedError(self.ended)

    def kill(self):
        self.is_gone = True

    close = kill


class FakeAnswer:
    """Of a pool: it comes, unless the pool is dead."""

    def __init__(self, pool, done=False):
        self._pool = pool
        self._done = done

    def done(self):
        return self._done

    def result(self, timeout):
        if not self._done:
            self._pool.check_health()
        return "a report"


def make_ranks(most=3, pools=None):
    """Ranks over fake pools, or over those that `pools` makes."""
    return Ranks(pools or FakePool, RestartLimit(most, clock=lambda: 0.0))


def counted_pools(last):
    """An event that is set when the pool of that number is made, the pools that were made, and what makes them."""
    begun, made = threading.Event(), []

    def pools():
        made.append(FakePool())
        if len(made) == last:
            begun.set()
        return made[-1]

    return begun, made, pools


def test_an_answer_that_ranks_died_over_is_none():
    """An answer that ranks died over is none and they are there again."""
    ranks = make_ranks()
    old = ranks.pool
    lost = [FakeAnswer(old), FakeAnswer(old)]
    came_before = FakeAnswer(old, done=True)
    old.die()
    assert ranks.answer(lost[0], epoch=0) is None
    assert old.is_gone
    assert (ranks.epoch, ranks.is_restarting) == (1, False)
    assert ranks.answer(lost[1], epoch=0) is None, "this one is no further death"
    assert ranks.epoch == 1
    assert ranks.answer(came_before, epoch=0) == "a report"
    assert ranks.answer(FakeAnswer(ranks.pool), epoch=1) == "a report"


def test_ranks_that_die_while_they_start_are_started_again():
    outcomes = iter([FakePool(), RankDiedError("killed while it started"), FakePool()])

    def pools():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    ranks = make_ranks(pools=pools)
    ranks.restart(RankDiedError("gone"))
    assert ranks.epoch == 1
    assert next(outcomes, None) is None


def test_too_many_restarts_name_the_cause_and_the_setting(caplog):
    """The error after too many restarts names cause and setting."""
    ranks = make_ranks(most=2)
    for _ in range(2):
        ranks.restart(RankDiedError("gone"))
    with pytest.raises(RankDiedError, match=r"^rank 1 ended with code -9; cfg_max_restarts=2 allows no further"):
        ranks.restart(RankDiedError("rank 1 ended with code -9"))
    assert ranks.is_restarting, "nobody can be served any more"
    assert ranks.heal() is None, "the one whom it was raised for ends the engine, and nobody tries again"
    assert len(caplog.messages) == 3 + 2, "each death once, and each start"


def test_deaths_of_a_request_that_is_tried_alone_do_not_count():
    ranks = make_ranks(most=0)
    ranks.is_trial = True
    ranks.restart(RankDiedError("gone"))
    assert ranks.epoch == 1
    ranks.is_trial = False
    with pytest.raises(RankDiedError):
        ranks.restart(RankDiedError("gone"))


def test_the_limit_forgets_what_is_ten_minutes_ago():
    now = [0.0]
    limit = RestartLimit(2, clock=lambda: now[0])
    for _ in range(6):
        limit.note(RankDiedError("gone"))
        now[0] += WINDOW_SECONDS / 2 + 1
    with pytest.raises(RankDiedError):
        RestartLimit(0).note(RankDiedError("gone"))


def test_an_idle_engines_ranks_are_started_by_the_watcher():
    """While the engine is idle the watching thread starts them anew."""
    begun, made, pools = counted_pools(2)
    ranks = make_ranks(pools=pools)
    ranks.watch(lambda error: pytest.fail("they could be started"))
    made[0].die()
    assert begun.wait(10)
    ranks.close()
    assert ranks.epoch == 1


@pytest.mark.parametrize("error", [RankDiedError("again"), ConfigurationError("the checkpoint is gone")])
def test_ranks_that_cannot_be_started_anew_are_reported_once(error):
    failed, pools = threading.Event(), iter([FakePool()])

    def make_pool():
        pool = next(pools, None)
        if pool is None:
            raise error
        return pool

    ranks = make_ranks(pools=make_pool)
    said = []
    ranks.watch(lambda error: (said.append(error), failed.set()))
    ranks.pool.die()
    assert failed.wait(10)
    assert str(said[0]).startswith(str(error))


def test_nobody_is_started_anew_once_they_are_closed():
    ranks = make_ranks()
    ranks.close()
    ranks.pool.die()
    assert ranks.heal() is None
    assert ranks.epoch == 0


def test_the_watching_thread_keeps_nothing_alive():
    ranks = make_ranks()
    ranks.watch(lambda error: None)
    gone = threading.Event()
    weakref.finalize(ranks, gone.set)
    del ranks
    gc.collect()
    assert gone.wait(10)


def test_sleeping_ranks_are_not_missed():
    """Ranks that sleep are not missed and are watched again when they wake up."""
    begun, made, pools = counted_pools(3)
    ranks = make_ranks(pools=pools)
    ranks.watch(lambda error: pytest.fail("they could be started"))
    ranks.sleep()
    made[0].die()
    del made[0].processes.sentinels  # nobody may look at them any more
    assert ranks.sentinels == []
    assert ranks.heal() is None
    assert (ranks.epoch, len(made)) == (1, 1)
    ranks.wake_up()
    made[1].die()
    assert begun.wait(10)
    ranks.close()
    assert ranks.epoch == 2


def test_a_plan_that_ranks_died_over_is_answered_with_their_loss():
    ranks = make_ranks()
    answer = PlanAnswer(ranks, FakeAnswer(ranks.pool))
    ranks.pool.die()
    assert answer.result() == StepResult(epoch=1, was_lost=True)
