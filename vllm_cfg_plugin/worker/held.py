"""The requests that a rank holds: which of them step, and which can't go on. Must not import torch.distributed.

A request that is unknown here has failed, and its retirement is on its way.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_cfg_plugin.distributed.sequence_group import MemberFailedError
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.worker.lineup import Lineup
from vllm_cfg_plugin.worker.state import RequestState

logger = get_logger(__name__)


class HeldRequests:
    """All requests of one rank.

    Attributes:
        states: of every request, by id.
    """

    def __init__(self) -> None:
        self.states: dict[int, RequestState] = {}
        self._running: dict[int, RequestState] = {}
        self._lineup: Lineup | None = None  # of `_running`; None when that or an owner has changed
        self._failures: list[tuple[int, str]] = []  # to be reported

    @property
    def any_running(self) -> bool:
        return bool(self._running)

    def run(self, state: RequestState, owners: tuple[int, ...] | None) -> None:
        """Let a request take part in every step, its branches forwarded by these ranks; with None it sits out."""
        if owners is None:
            self.leave(state.id)
            return
        state.owners = owners
        self._running[state.id] = state
        self._lineup = None

    def leave(self, id: int) -> None:
        """Let a request take part in no further step."""
        if self._running.pop(id, None) is not None:
            self._lineup = None

    def forget(self, id: int) -> RequestState | None:
        """Drop a request, if it is here."""
        self.leave(id)
        return self.states.pop(id, None)

    def line_up(self, long: Sequence[RequestState], rank: int, ranks: int) -> Lineup:
        """Who steps now: the running requests, and long ones, whose forwards are done."""
        if long:
            return Lineup.of([*self._running.values()], long, rank, ranks)
        if self._lineup is None:
            self._lineup = Lineup.of([*self._running.values()], (), rank, ranks)
        return self._lineup

    def note_failure(self, state: RequestState, doing: str, error: Exception) -> None:
        """A request can't go on: the other ranks learn of it in the next exchange, the engine with the next report."""
        logger.error("A request failed while %s", doing, exc_info=error)
        if state.error:  # its other branch may have failed just before
            return
        state.error = f"failed while {doing}: {type(error).__name__}: {error}"
        if not isinstance(error, MemberFailedError):  # which reports why
            self._failures.append((state.id, state.error))

    def take_failures(self) -> list[tuple[int, str]]:
        """(request id, message) of those that have failed since the last call."""
        failures, self._failures = self._failures, []
        return failures
