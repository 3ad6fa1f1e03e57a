"""Continuous batching of denoising steps: who waits, runs and drains, and the next step's plan. Must not import vLLM.

A request joins at any engine step and leaves after its last; admission is first come first served under a number of
requests and a number of tokens per rank and step. Steps are known ahead: a plan is made before the last one's report.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import count

from vllm_cfg_plugin.engine import planner
from vllm_cfg_plugin.engine.plan import Admission, Decode, Forward, StepPlan
from vllm_cfg_plugin.engine.planner import BranchLoad
from vllm_cfg_plugin.engine.request import ScheduledRequest
from vllm_cfg_plugin.engine.step_result import StepResult
from vllm_cfg_plugin.params import DiffusionRequest


class StepBatch:
    """All requests of one engine.

    Args:
        ranks: cfg ranks that share the work.
        max_requests: most requests in one step.
        max_tokens: most image and text tokens that one rank forwards in one step.
    """

    def __init__(self, ranks: int, max_requests: int, max_tokens: int) -> None:
        self._ranks = ranks
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._ids = count()
        self._steps = count()
        self._by_name: dict[str, ScheduledRequest] = {}
        self.waiting: deque[ScheduledRequest] = deque()
        self.running: dict[int, ScheduledRequest] = {}
        self.draining: dict[int, ScheduledRequest] = {}
        self.retired: list[int] = []  # ids that the ranks must be told to forget
        self._decodes = [0] * ranks

    def add(self, request_id: str, client_index: int, spec: DiffusionRequest) -> ScheduledRequest:
        request = ScheduledRequest(request_id, client_index, next(self._ids), spec)
        self.waiting.append(request)
        self._by_name[request_id] = request
        return request

    def named(self, request_id: str) -> ScheduledRequest | None:
        return self._by_name.get(request_id)

    def all_requests(self) -> list[ScheduledRequest]:
        return list(self._by_name.values())

    def active(self, id: int) -> ScheduledRequest | None:
        """The request if the ranks know it and nobody has taken it out."""
        return self.running.get(id) or self.draining.get(id)

    def take_out(self, request: ScheduledRequest) -> None:
        """Drop a request that failed or was aborted, wherever it is; the next plan tells the ranks."""
        self.finish(request)
        self.retired.append(request.id)

    def finish(self, request: ScheduledRequest) -> None:
        """Drop a request whose image is here: the ranks forgot it when they decoded it."""
        del self._by_name[request.request_id]
        if self.running.pop(request.id, None) is None and self.draining.pop(request.id, None) is None:
            self.waiting.remove(request)

    def next_plan(self, admit: bool = True, step: bool = True) -> tuple[StepPlan, list[ScheduledRequest]]:
        """The next step's plan and the requests that join with it; empty when everything is planned already.

        Args:
            admit, step: whether requests may join, and whether running ones go on (False while paused).
        """
        admitted = self._admit() if admit and step else []
        active = list(self.running.values()) if step else []
        self._rebalance()
        loads = planner.rank_loads((request.load for request in active), self._ranks)
        plan = StepPlan(
            step=next(self._steps),
            retire=self.retired,
            admit=[Admission(request.id, request.spec) for request in admitted],
            forwards=[self._plan_forward(request) for request in active],
            decodes=self._plan_decodes(loads),
        )
        self.retired = []
        return plan, admitted

    def note_progress(self, plan: StepPlan, result: StepResult) -> list[ScheduledRequest]:
        """Note what a plan's reports say of its requests' steps; returns the requests that got on."""
        progressed = []
        for forward in plan.forwards:
            request = self.active(forward.id)
            if request is None or forward.id in result.failed:
                continue
            request.began = request.began or result.began
            request.denoised = result.denoised
            request.encode_ms += result.encode_ms.get(forward.id, 0.0)
            request.done_steps = forward.index + 1
            progressed.append(request)
        return progressed

    def _admit(self) -> list[ScheduledRequest]:
        """Requests that join now, in order of arrival; one too large for the token budget runs alone."""
        admitted = []
        while self.waiting and len(self.running) < self._max_requests:
            request = self.waiting[0]
            loads = planner.rank_loads((r.load for r in self.running.values()), self._ranks)
            owners = planner.assign_owners(request.branch_tokens, loads)
            joined = planner.rank_loads(
                [*(r.load for r in self.running.values()), BranchLoad(request.id, request.branch_tokens, owners)],
                self._ranks,
            )
            if self.running and max(joined) > self._max_tokens:
                break
            request.owners, request.admitted = owners, time.monotonic()
            self.running[request.id] = self.waiting.popleft()
            admitted.append(request)
        return admitted

    def _rebalance(self) -> None:
        for id, owners in planner.rebalance([r.load for r in self.running.values()], self._ranks).items():
            self.running[id].owners = owners

    def _plan_forward(self, request: ScheduledRequest) -> Forward:
        forward = Forward(request.id, request.planned_steps, request.owners)
        request.planned_steps += 1
        return forward

    def _plan_decodes(self, loads: list[int]) -> list[Decode]:
        """Decodes of the requests whose last step this plan holds; each counts as its image's tokens of work."""
        decodes = []
        loads = list(loads)
        for request in [r for r in self.running.values() if r.fully_planned]:
            rank = planner.choose_decode_rank(loads, self._decodes)
            loads[rank] += request.spec.image_tokens
            self._decodes[rank] += 1
            decodes.append(Decode(request.id, rank))
            self.draining[request.id] = self.running.pop(request.id)
        return decodes
