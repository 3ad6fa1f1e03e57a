"""Who takes part in which denoising step: requests start when their texts are encoded and end after their last. Pure.

Steps are known ahead, so while nothing changes the next one costs the same for any number of requests. Short requests
take every step together; long ones, whose forwards run beside the steps, go at their own pace. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import chain

from vllm_cfg_plugin.engine.placement import Placement
from vllm_cfg_plugin.engine.plan import Assign, Encode, Preview
from vllm_cfg_plugin.engine.planner import rank_loads
from vllm_cfg_plugin.engine.preview_debts import note_preview, sit_out
from vllm_cfg_plugin.engine.request import ScheduledRequest

Requests = dict[int, ScheduledRequest]
Owners = dict[ScheduledRequest, tuple[int, ...]]  # ranks that forward the branches of a step


class Stepping:
    """The requests that take steps, or will when their texts are encoded.

    Attributes:
        preparing: their texts are being encoded.
        running: they take every step, or sit some out (`preview_debts`).
        beside: long ones, which take steps of their own.
        lineup: who of `running` takes the step, with the ranks that forward its branches; the same object as long as
            these are the same.
    """

    def __init__(self, placement: Placement, ranks: int) -> None:
        self.preparing: Requests = {}
        self.running: Requests = {}
        self.beside: Requests = {}
        self.lineup: Owners = {}
        self._placement = placement
        self._ranks = ranks
        self._watched: Requests = {}  # whose previews are to be made
        self._tick = 0  # steps so far
        self._has_changed = False  # `running`, or who holds what of theirs
        self._awaited: set[int] | None = None  # preparing requests that an idle batch starts together with
        self._next_change = 0  # first tick at which a running request forwards other branches, or none

    def __iter__(self) -> Iterator[ScheduledRequest]:
        return chain(self.preparing.values(), self.running.values(), self.beside.values())

    def prepare(self, request: ScheduledRequest) -> None:
        """Let a request join the steps when its texts are encoded."""
        self.preparing[request.id] = request
        if request.awaits_previews:
            self._watched[request.id] = request

    def drop(self, request: ScheduledRequest) -> None:
        """Forget a request, wherever it is."""
        self.note_change(request)
        for stage in (self.preparing, self.running, self.beside, self._watched):
            stage.pop(request.id, None)

    def note_change(self, request: ScheduledRequest) -> None:
        """The ranks that hold what a running request needs are others now, so it may be levelled anew."""
        self._has_changed |= request.id in self.running

    # ---- requests that take every step ----

    def line_up(self, encodes: list[Encode]) -> list[Assign]:
        """Let the requests whose texts are encoded join the steps, and level who forwards what if anything changed.

        Args:
            encodes: of the plan; those that levelling asks for are added.

        Returns:
            What the ranks must be told of who forwards what.
        """
        started = self._who_starts()
        for request in started:
            request.first_tick = self._tick - request.kept_steps
            self.running[request.id] = self.preparing.pop(request.id)
        if not started and not self._has_changed and self._tick < self._next_change:
            return []
        self._has_changed = False
        running = tuple(self.running.values())
        resting = sit_out(running, self._tick, self._ranks)
        going = [request for request in running if request not in resting]
        changes = (request.next_change(self._tick) for request in going)
        self._next_change = self._tick + 1 if resting else min(changes, default=0)
        encodes += self._placement.level(going, self._tick, (*self.preparing.values(), *resting))
        self.lineup = {request: request.owners[: request.branches_at(self._tick)] for request in going}
        return _new_assignments(self.lineup | dict.fromkeys(resting))

    def take_step(self) -> list[ScheduledRequest]:
        """Take a step of the lineup; returns those whose last it is, and who run no more."""
        self._tick += 1
        if self._tick < self._next_change:
            return []
        finished = [request for request in self.lineup if request.last_tick < self._tick]
        for request in finished:
            del self.running[request.id]
            self._has_changed = True
        return finished

    def loads(self) -> list[int]:
        """Each rank's predicted microseconds of a step of the lineup."""
        loads = [0] * self._ranks
        for request in self.lineup:
            loads = rank_loads(request.costs, request.owners, self._ranks, loads)
        return loads

    def _who_starts(self) -> list[ScheduledRequest]:
        """The requests whose texts are encoded.

        An idle batch waits for the texts that are being encoded when its first request is ready, and for no others:
        the encodes have the ranks to themselves then, and all step in full packs from the start.
        """
        short = [request for request in self.preparing.values() if not request.is_long]
        ready = [request for request in short if request.is_ready]
        if not ready or self.running:
            return ready
        if self._awaited is None:
            self._awaited = {request.id for request in short if not request.is_ready}
        if any(id in self.preparing and not self.preparing[id].is_ready for id in self._awaited):
            return []
        self._awaited = None
        return ready

    # ---- long requests ----

    def start_long(self) -> list[ScheduledRequest]:
        """Long requests whose texts are encoded, for their first step."""
        ready = [request for request in self.preparing.values() if request.is_long and request.is_ready]
        for request in ready:
            self.beside[request.id] = self.preparing.pop(request.id)
            request.forwarding = set(request.owners)
        return ready

    def forwarded(self) -> Owners:
        """Long requests whose forwards are done, and the ranks that did them."""
        return {request: request.long_owners for request in self.beside.values() if not request.forwarding}

    def take_long_steps(self, stepping: Collection[ScheduledRequest]) -> list[ScheduledRequest]:
        """Take a step of long requests; returns those whose last it is."""
        for request in stepping:
            request.long_steps += 1
        finished = [request for request in stepping if request.long_steps == request.spec.steps]
        for request in finished:
            del self.beside[request.id]
        return finished

    # ---- previews ----

    def previews(self, long: Collection[ScheduledRequest]) -> list[Preview]:
        """Previews that are due after the step that was just taken; `long`: the long requests that took one."""
        due = [request for request in self._watched.values() if self._preview_is_due(request, long)]
        previews = [self._placement.preview(request, self.loads()) for request in due]
        for request in due:
            if not request.is_long:
                note_preview(request)
                self._has_changed = True
            if not request.awaits_previews:
                del self._watched[request.id]
        return previews

    def _preview_is_due(self, request: ScheduledRequest, long: Collection[ScheduledRequest]) -> bool:
        if request.is_long:
            return request in long and request.preview_is_due(request.long_steps)
        steps = request.id in self.running and request in self.lineup  # and does not sit this one out
        return steps and request.preview_is_due(self._tick - request.first_tick)


def _new_assignments(owners: Mapping[ScheduledRequest, tuple[int, ...] | None]) -> list[Assign]:
    """What the ranks must be told of who forwards what from now on: what they were not told last."""
    changed = {request: ranks for request, ranks in owners.items() if ranks != request.assigned}
    for request, ranks in changed.items():
        request.assigned = ranks
    return [Assign(request.id, ranks) for request, ranks in changed.items()]
