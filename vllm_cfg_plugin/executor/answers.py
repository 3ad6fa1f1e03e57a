"""What the ranks answer, as futures: to plans, to calls, and without being asked, of their side work."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import cloudpickle

from vllm_cfg_plugin.engine import plan as wire
from vllm_cfg_plugin.engine.plan import StepReport
from vllm_cfg_plugin.engine.step_result import SideResult, StepResult, merge_reports
from vllm_cfg_plugin.errors import RankDiedError, RanksRestartedError
from vllm_cfg_plugin.executor import channel
from vllm_cfg_plugin.executor.rank_pool import Frames, PendingAnswer, RankPool
from vllm_cfg_plugin.executor.ranks import Ranks

CALL_AGAIN = "the cfg ranks were started anew during the call: what it did is undone; call it again"
_SIDE_WAIT_SECONDS = 0.002


class PlanAnswer(Future[StepResult]):
    """The reports on a plan; if the ranks were started anew before they came, that alone."""

    def __init__(self, ranks: Ranks, pending: PendingAnswer) -> None:
        super().__init__()
        self._ranks = ranks
        self._pending = pending
        self._epoch = ranks.epoch

    def result(self, timeout: float | None = None) -> StepResult:
        merged: StepResult | None = self._ranks.answer(self._pending, self._epoch, timeout)
        return merged or StepResult(epoch=self._ranks.epoch, was_lost=True)


class CallAnswer(PlanAnswer):
    """The answers to a method call."""

    def result(self, timeout: float | None = None) -> Any:
        answers = self._ranks.answer(self._pending, self._epoch, timeout)
        if answers is None:
            raise RanksRestartedError(CALL_AGAIN)
        return answers


class SideAnswer(Future[StepResult]):
    """The next side reports; empty after a moment, because a new request must not wait for a long decode to end."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks
        self._epoch = ranks.epoch

    def result(self, timeout: float | None = None) -> StepResult:
        ranks = self._ranks
        with ranks.lock:
            if self._epoch == ranks.epoch:
                try:
                    return StepResult(epoch=self._epoch, side=self._wait(ranks.pool))
                except RankDiedError as error:
                    ranks.restart(error)
            return StepResult(epoch=ranks.epoch, was_lost=True)

    def _wait(self, pool: RankPool) -> list[SideResult]:
        # While an answer to a plan is due, the engine waits for that one, and side reports come with it.
        if not pool.side_messages and not pool.has_pending:
            try:
                pool.pump(_SIDE_WAIT_SECONDS)
            except TimeoutError:
                pool.check_silence()
        return _take_side_results(pool)


def done(result: StepResult) -> Future[StepResult]:
    """A future that has this result already."""
    future: Future[StepResult] = Future()
    future.set_result(result)
    return future


def merge_plan_reports(pool: RankPool, epoch: int, reports: list[StepReport]) -> StepResult:
    """What came of a plan, with the side reports that have arrived meanwhile."""
    return merge_reports(reports, epoch, _take_side_results(pool))


def _take_side_results(pool: RankPool) -> list[SideResult]:
    """Take the side reports that have arrived; pixels stay in ZMQ's buffers."""
    messages, pool.side_messages = pool.side_messages, []
    return [
        (wire.decode_side_report(payload), memoryview(pixels[0]) if pixels else None) for payload, *pixels in messages
    ]


def read_answer(kind: bytes, frames: Frames) -> tuple[tuple[bytes, int], Any]:
    """Which message a rank's frames answer, and with what."""
    (payload,) = frames
    if kind == channel.PONG:
        return (channel.PING, 0), None
    if kind == channel.REPORT:
        report = wire.decode_report(payload)
        return (channel.PLAN, report.step), report
    number, ok, value = cloudpickle.loads(payload)
    return (channel.CALL, number), (ok, value)


def merge_calls(names: Sequence[str], answers: list[tuple[bool, Any]]) -> list[Any]:
    """What a call returned on every rank.

    Raises:
        RuntimeError: it failed on one of them.
    """
    for name, (ok, value) in zip(names, answers, strict=True):
        if not ok:
            raise RuntimeError(f"the call failed on cfg rank {name}: {value}")
    return [value for _, value in answers]
