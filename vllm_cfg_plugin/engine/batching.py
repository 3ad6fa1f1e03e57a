"""Continuous batching of denoising steps: a request's way through the engine, and each step's plan. Pure.

A request joins at any engine step and leaves after its last. Steps are known ahead: a plan is made before the last
one's report is in, and while nothing changes making it costs the same for any number of requests. The clock is an
argument, so that `benchmarks/simulate.py` runs this very code in virtual time. Must not import vLLM or torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from vllm_cfg_plugin.engine.admission import Room, WaitingLine
from vllm_cfg_plugin.engine.cost import CostModel
from vllm_cfg_plugin.engine.placement import Placement
from vllm_cfg_plugin.engine.plan import (
    DECODED,
    FORWARDED,
    KEPT,
    PREVIEWED,
    Admission,
    Decode,
    Embeds,
    SideReport,
    StepPlan,
)
from vllm_cfg_plugin.engine.request import ScheduledRequest, check_plannable
from vllm_cfg_plugin.engine.step_result import StepResult
from vllm_cfg_plugin.engine.stepping import Owners, Stepping
from vllm_cfg_plugin.params import DiffusionRequest


@dataclass(frozen=True)
class PlannedStep:
    """A plan and who is in it.

    Attributes:
        admitted: requests that join.
        running: requests that take a step, with the ranks that forward their branches; the same object as long as
            these are the same.
        forwarding: long requests whose next step's forwards begin.
    """

    plan: StepPlan
    admitted: list[ScheduledRequest]
    running: Owners
    forwarding: list[ScheduledRequest]


class StepBatch:
    """All requests of one engine.

    Args:
        ranks: cfg ranks that share the work.
        max_requests: most requests that the ranks hold at a time, whether they are being encoded, stepped or decoded.
        max_tokens: most image and text tokens that one rank forwards in one step.
        cost: predicts what work costs.
        clock: seconds.
        max_step_us: most predicted microseconds of one rank's forwards in one step.
        max_side_us: an encode or decode that is predicted to take longer is one that no short ones wait for.
        processes: that a rank is.
        max_decode_tokens: of an image that is decoded as a whole, larger ones in tiles.
        encoder_rank: the one rank that has the text encoders; None where all have them.
        max_adapters: most different adapters that requests at work carry.
    """

    placement_class = Placement

    def __init__(
        self,
        ranks: int,
        max_requests: int,
        max_tokens: int,
        cost: CostModel,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_step_us: float = math.inf,
        max_side_us: float = math.inf,
        processes: int = 1,
        max_decode_tokens: float = math.inf,
        encoder_rank: int | None = None,
        max_adapters: float = math.inf,
    ) -> None:
        self._ranks = ranks
        self._max_decode_tokens = max_decode_tokens
        self._processes = processes
        self._encoder_rank = encoder_rank
        self._max_adapters = max_adapters
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._max_step_us = max_step_us
        self._max_side_us = max_side_us
        self._cost = cost
        self._clock = clock
        self._ids = count()
        self._plans = count()
        self._by_name: dict[str, ScheduledRequest] = {}
        self.waiting = WaitingLine()
        self._meet_ranks()

    def _meet_ranks(self) -> None:
        """Begin with ranks that know nothing."""
        self._placement = self.placement_class(
            self._ranks,
            self._max_side_us,
            self._processes,
            self._max_tokens,
            max_decode_tokens=self._max_decode_tokens,
            encoder_rank=self._encoder_rank,
        )
        # Long requests hold at most half of the places: their decodes may stand in line for minutes.
        max_long, max_us = max(1, self._max_requests // 2), self._max_step_us - self._cost.step_us
        self._room = Room(self._ranks, self._placement, self._max_tokens, max_us, max_long, self._max_adapters)
        self._known: dict[int, ScheduledRequest] = {}  # what the ranks know: stepping and draining
        self.stepping = Stepping(self._placement, self._ranks)
        self.draining: dict[int, ScheduledRequest] = {}
        self._tried: ScheduledRequest | None = None  # the last suspect that joined
        self._may_admit = True  # something changed since nobody more could join
        self.retired: list[int] = []  # ids that the ranks must be told to forget
        self._embeds: list[Embeds] = []  # that the ranks must be sent

    # ---- requests come and go ----

    def add(self, request_id: str, client_index: int, spec: DiffusionRequest) -> ScheduledRequest:
        """Queue a request.

        Raises:
            ValueError: no steps can be planned for it, or its name is taken.
        """
        if request_id in self._by_name:
            raise ValueError(f"request_id={request_id!r} is the name of another request: give each its own")
        check_plannable(spec)
        request = ScheduledRequest(request_id, client_index, next(self._ids), spec, self._cost, self._clock())
        request.is_long = self._room.is_long(request)
        self.waiting.append(request)
        self._by_name[request_id] = request
        self._may_admit = True
        return request

    def __len__(self) -> int:
        """Requests that are not answered yet."""
        return len(self._by_name)

    def named(self, request_id: str) -> ScheduledRequest | None:
        return self._by_name.get(request_id)

    def all_requests(self) -> list[ScheduledRequest]:
        return list(self._by_name.values())

    def known(self, id: int) -> ScheduledRequest | None:
        """The request if the ranks know it and nobody has taken it out."""
        return self._known.get(id)

    def take_out(self, request: ScheduledRequest) -> None:
        """Drop a request that failed or was aborted, wherever it is; the next plan tells the ranks."""
        if request.id in self._known:
            self.retired.append(request.id)
        self.finish(request)

    def finish(self, request: ScheduledRequest) -> None:
        """Drop a request whose image is here: the ranks forgot it when they decoded it."""
        del self._by_name[request.request_id]
        if self._known.pop(request.id, None) is None:
            self.waiting.remove(request)
        self.stepping.drop(request)
        self.draining.pop(request.id, None)
        self._placement.forget(request)
        self._may_admit = True

    def start_over(self, has_killed: bool) -> list[ScheduledRequest]:
        """The ranks were started anew: all that they knew waits again, where it stood.

        Args:
            has_killed: it may be one of these requests that the old ranks died of.

        Returns:
            Requests that the ranks surely died of.
        """
        known = sorted(self._known.values(), key=lambda request: request.id)
        suspected = [request for request in known if not request.is_cleared] or known
        for request in known:
            if has_killed:
                request.note_death(alone=suspected == [request])
            request.start_over()
        self.waiting.put_back(known)
        self._meet_ranks()
        return [request for request in known if request.kills_ranks]

    @property
    def is_trial(self) -> bool:
        """Whether the ranks know a suspect, and beside it only who is cleared."""
        return self._tried is not None and self._tried.is_suspect and self._tried.id in self._known

    # ---- plans ----

    @property
    def awaits_side_work(self) -> bool:
        """Whether ranks are encoding or decoding, or forwarding beside the steps."""
        return self._placement.has_side_work

    def next_plan(self, admit: bool = True, step: bool = True) -> PlannedStep:
        """The next step's plan; empty when there is nothing to tell the ranks.

        Args:
            admit, step: whether requests may join, and whether running ones go on (False while paused).
        """
        admitted = self._admit() if admit and step else []
        encodes = [encode for request in admitted for encode in self._placement.first_encodes(request)]
        assign = self.stepping.line_up(encodes) if step else []
        running = self.stepping.lineup if step else {}
        forwarding = self.stepping.start_long() if step else []
        long = self.stepping.forwarded() if step else {}
        finished = (self.stepping.take_step() if running else []) + self.stepping.take_long_steps(long)
        forwarding += [request for request in long if request.id in self.stepping.beside]
        plan = StepPlan(
            step=next(self._plans),
            retire=self.retired,
            admit=[Admission(request.id, request.spec, request.kept) for request in admitted],
            encodes=encodes,
            assign=assign,
            advance=bool(running),
            decodes=self._decode(finished) if finished else [],
            long_steps=[request.id for request in long],
            forwards=[self._placement.forward(request) for request in forwarding],
            previews=self.stepping.previews(long) if step else [],
            embeds=self._embeds,
        )
        self.retired, self._embeds = [], []
        return PlannedStep(plan, admitted, running | long if long else running, forwarding)

    def note_result(self, planned: PlannedStep, result: StepResult) -> None:
        """Note what the reports of a plan say of its requests."""
        for request in planned.admitted:
            request.is_prepared = request.id not in result.failed
        for request in planned.running:
            if request.id not in result.failed:
                self._may_admit |= request.note_step()
                request.began = request.began or result.began
                request.denoised = result.denoised
        for request in planned.forwarding:
            request.began = request.began or result.began

    def note_side_report(self, report: SideReport) -> ScheduledRequest | None:
        """Note that a piece of side work is done; returns its request if it is still here."""
        is_done = self._placement.note_done(report)
        request = self._known.get(report.id)
        if request is not None and report.branch == PREVIEWED:
            request.made_previews += 1
        if request is None or report.error or report.branch in (DECODED, KEPT, PREVIEWED):
            return request
        if not is_done:
            return request
        if report.branch == FORWARDED:
            request.forwarding.discard(report.rank)
            return request
        request.encode_ms = max(request.encode_ms, report.milliseconds)
        self._placement.note_encoded(report, request)
        self.stepping.note_change(request)
        return request

    def share_embeds(self, report: SideReport, data: bytes) -> None:
        """Send what a rank encoded to the others that were asked to hold it, with the next plan."""
        request = self._known.get(report.id)
        if request is None or report.rank not in request.holders[report.branch]:
            return  # it has left, or others of the rank's processes are still at it: the last one's serve all
        if ranks := request.asked[report.branch] - request.holders[report.branch]:
            self._embeds.append(Embeds(report.id, report.branch, tuple(sorted(ranks)), data))

    def _admit(self) -> list[ScheduledRequest]:
        """Requests that join now."""
        if not self._may_admit or not self.waiting:
            return []
        self._room.look(self.stepping, self.draining.values())

        def try_to_join(request: ScheduledRequest) -> bool:
            if len(self._known) >= self._max_requests or not self._may_share(request):
                return False
            if not self._room.let_in(request):
                return False
            self._start_preparing(request)
            return True

        admitted = list(self.waiting.take(try_to_join))
        self._may_admit = bool(admitted)  # one look at the line may not have reached its end
        return admitted

    def _may_share(self, newcomer: ScheduledRequest) -> bool:
        """A request that the ranks may have died of shares them with nobody who may be why they die next."""
        if newcomer.is_suspect:
            return all(request.is_cleared for request in self._known.values())
        return not self.is_trial

    def _start_preparing(self, request: ScheduledRequest) -> None:
        request.admitted = self._clock()
        request.asked = [set() for _ in request.owners]
        request.holders = [set() for _ in request.owners]
        self._known[request.id] = request
        if request.is_suspect:
            self._tried = request
        self.stepping.prepare(request)

    def _decode(self, finished: Sequence[ScheduledRequest]) -> list[Decode]:
        loads = self.stepping.loads()
        self.draining.update((request.id, request) for request in finished)
        self._may_admit = True
        return [self._placement.decode(request, loads) for request in finished]
