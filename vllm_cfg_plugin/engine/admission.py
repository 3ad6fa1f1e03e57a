"""Who may join the running batch: first come first served under two limits; a bounded number may overtake. Pure.

A request that does not fit yet may be overtaken by later ones that do, so that a large one at the head blocks nobody
behind it; but by at most `MAX_OVERTAKEN` of them, so that it does not starve: from then on nobody behind it joins until
it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from vllm_cfg_plugin.engine.request import ScheduledRequest

MAX_OVERTAKEN = 8
# How far behind the head to look for one that fits: keeps admission cheap however long the line is.
LOOK_AHEAD = 64


class WaitingLine:
    """Requests in order of arrival."""

    def __init__(self) -> None:
        self._requests: dict[int, ScheduledRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def append(self, request: ScheduledRequest) -> None:
        self._requests[request.id] = request

    def put_back(self, requests: Iterable[ScheduledRequest]) -> None:
        """Requests that were taken out wait again, before all others."""
        self._requests = {request.id: request for request in requests} | self._requests

    def remove(self, request: ScheduledRequest) -> None:
        del self._requests[request.id]

    def take(self, try_to_join: Callable[[ScheduledRequest], bool]) -> Iterator[ScheduledRequest]:
        """Take out, one by one, the requests that join now.

        Args:
            try_to_join: lets a request join if it fits beside those that have joined, and says whether it did.
        """
        passed: list[ScheduledRequest] = []
        for request in list(islice(self._requests.values(), LOOK_AHEAD)):
            if try_to_join(request):
                self.remove(request)
                for earlier in passed:
                    earlier.overtaken += 1
                yield request
            else:
                passed.append(request)
            if any(earlier.overtaken >= MAX_OVERTAKEN for earlier in passed):
                return
