"""Who may join: the shortest first, within the room that is left; a bounded number may overtake. Pure.

A request that does not fit yet, or that takes longer than another, may be overtaken by later ones; but by at most
`MAX_OVERTAKEN` of them, so that it does not starve: from then on nobody behind it joins until it has. Long requests,
whose forwards run beside the steps, stand in a line of their own: what one of those waits for, others do not need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from vllm_cfg_plugin.engine.placement import Placement
from vllm_cfg_plugin.engine.planner import rank_loads
from vllm_cfg_plugin.engine.request import ScheduledRequest

MAX_OVERTAKEN = 8
# How far behind the head to look for one that fits: keeps admission cheap however long the line is.
LOOK_AHEAD = 64

Line = dict[int, ScheduledRequest]


class WaitingLine:
    """Requests in order of arrival."""

    def __init__(self) -> None:
        self._lines: tuple[Line, Line, Line] = ({}, {}, {})  # of suspects, long and short requests

    def __len__(self) -> int:
        return sum(map(len, self._lines))

    def append(self, request: ScheduledRequest) -> None:
        self._line_of(request)[request.id] = request

    def put_back(self, requests: Iterable[ScheduledRequest]) -> None:
        """Requests that were taken out wait again, where they stood."""
        waiting = [*self.in_order(), *requests]
        for line in self._lines:
            line.clear()
        for request in sorted(waiting, key=lambda request: request.id):
            self.append(request)

    def remove(self, request: ScheduledRequest) -> None:
        del self._line_of(request)[request.id]

    def in_order(self) -> list[ScheduledRequest]:
        """All requests in order of arrival."""
        return sorted((request for line in self._lines for request in line.values()), key=lambda request: request.id)

    def take(self, try_to_join: Callable[[ScheduledRequest], bool]) -> Iterator[ScheduledRequest]:
        """Take out, one by one, the requests that join now.

        Args:
            try_to_join: lets a request join if it fits beside those that have joined, and says whether it did.
        """
        suspects, long, short = self._lines
        if suspects:  # nobody else joins until they have been tried
            yield from _take(suspects, try_to_join)
            return
        # Long ones first: they are few at a time, and no stream of short ones can keep a place from them.
        for line in (long, short):
            yield from _take(line, try_to_join)

    def _line_of(self, request: ScheduledRequest) -> Line:
        suspects, long, short = self._lines
        return suspects if request.is_suspect else long if request.is_long else short


def _take(line: Line, try_to_join: Callable[[ScheduledRequest], bool]) -> Iterator[ScheduledRequest]:
    in_line = list(islice(line.values(), LOOK_AHEAD))
    last = _last_that_may_join(in_line)
    for request in sorted(in_line, key=_turn):
        if request.id > last or not try_to_join(request):
            continue
        del line[request.id]
        in_line.remove(request)
        for earlier in in_line:
            earlier.overtaken += earlier.id < request.id
        last = _last_that_may_join(in_line)
        yield request


def _turn(request: ScheduledRequest) -> tuple[int, bool, int]:
    """The sort key of a request: the shortest first, but those overtaken `MAX_OVERTAKEN / 2` times before all others.

    A suspect that was hit alone lets the others be tried first: what kills ranks from outside hits one of those then.
    """
    has_aged = request.overtaken >= MAX_OVERTAKEN // 2
    return len(request.lone_deaths) * request.is_suspect, not has_aged, request.id if has_aged else request.work


def _last_that_may_join(in_line: Sequence[ScheduledRequest]) -> float:
    """The id of the first that was overtaken as often as may be; infinity if there is none."""
    return min((request.id for request in in_line if request.overtaken >= MAX_OVERTAKEN), default=float("inf"))


class Room:
    """What is left for newcomers beside the requests that are at work.

    Args:
        max_tokens, max_us: of one rank's forwards in one step.
        max_long: most long requests among those that the ranks know.
        max_adapters: most different adapters that requests carry.
    """

    def __init__(
        self,
        ranks: int,
        placement: Placement,
        max_tokens: int,
        max_us: float,
        max_long: int,
        max_adapters: float = math.inf,
    ) -> None:
        self._ranks = ranks
        self._placement = placement
        self._max_tokens = max_tokens
        self._max_us = max_us
        self._max_long = max_long
        self._max_adapters = max_adapters
        self.look(())

    def look(self, stepping: Iterable[ScheduledRequest], draining: Iterable[ScheduledRequest] = ()) -> None:
        """See who is at work.

        Args:
            stepping: who takes steps, or will when its texts are encoded.
            draining: who was, and is being decoded.
        """
        self._costs, self._tokens, self._long_costs = ([0] * self._ranks for _ in range(3))
        self._long = sum(request.is_long for request in draining)
        self._adapters: set[str] = set()
        for request in stepping:
            self._take(request, request.owners)

    def is_long(self, request: ScheduledRequest) -> bool:
        """Whether a request is too much for a step that it has to itself."""
        owners = self._placement.owners_of_newcomer(request, [0] * self._ranks)
        return not self._fit(
            rank_loads(request.costs, owners, self._ranks), rank_loads(request.branch_tokens, owners, self._ranks)
        )

    def let_in(self, request: ScheduledRequest) -> bool:
        """Give a request its owners if it fits; no rank has two long ones, for which the others' limits don't hold."""
        if request.is_long:
            loads = self._long_costs
        else:  # of two ranks with equal loads the one that has no long request
            loads = [cost + bool(long) for cost, long in zip(self._costs, self._long_costs, strict=True)]
        owners = self._placement.owners_of_newcomer(request, loads)
        if request.spec.lora and len(self._adapters | request.spec.adapters) > self._max_adapters:
            return False
        if request.is_long:
            fits = self._long < self._max_long and not any(self._long_costs[owner] for owner in owners)
        else:
            fits = self._fit(
                rank_loads(request.costs, owners, self._ranks, self._costs),
                rank_loads(request.branch_tokens, owners, self._ranks, self._tokens),
            )
        if fits:
            request.owners = owners
            self._take(request, owners)
        return fits

    def _take(self, request: ScheduledRequest, owners: tuple[int, ...]) -> None:
        self._adapters |= request.spec.adapters
        if request.is_long:
            self._long += 1
            self._long_costs = rank_loads(request.costs, owners, self._ranks, self._long_costs)
        else:
            self._costs = rank_loads(request.costs, owners, self._ranks, self._costs)
            self._tokens = rank_loads(request.branch_tokens, owners, self._ranks, self._tokens)

    def _fit(self, costs: Sequence[int], tokens: Sequence[int]) -> bool:
        return max(tokens) <= self._max_tokens and max(costs) <= self._max_us
