"""Step plans on one rank: forget, admit, encode, assign, step, forward beside, decode; what may take long is side work.

Every rank carries out the same plan; what differs is which branches it owns, which texts it encodes and which images
it decodes. A cfg rank may be a sequence group of processes: they forward together, and decode in turn. Must not import
vLLM or torch.distributed: the collectives come in from outside.
"""

from __future__ import annotations

from collections import deque
from functools import partial

import torch

from vllm_cfg_plugin.distributed.sequence_group import NO_GROUPS, SequenceGroups
from vllm_cfg_plugin.engine.plan import Admission, Assign, Decode, Embeds, Encode, Forward, StepPlan, StepReport
from vllm_cfg_plugin.pipelines.base import EnginePipeline
from vllm_cfg_plugin.worker.adapters import NO_ADAPTERS, AdapterLimits, AdapterStore
from vllm_cfg_plugin.worker.beside import BesideSteps
from vllm_cfg_plugin.worker.exchange import AllGather
from vllm_cfg_plugin.worker.held import HeldRequests
from vllm_cfg_plugin.worker.lineup import checked_shape
from vllm_cfg_plugin.worker.out_of_memory import PackedForwards
from vllm_cfg_plugin.worker.pace import HostPace, Pace
from vllm_cfg_plugin.worker.side_work import SideWork
from vllm_cfg_plugin.worker.state import RequestState
from vllm_cfg_plugin.worker.step import DenoisingStep
from vllm_cfg_plugin.worker.unsettled import UnsettledPlan

_PREPARING = "preparing its latents"


class StepRunner:
    """Carries out step plans with one pipeline.

    Args:
        rank, ranks: this process in the cfg group.
        all_gather: [row] of every rank -> [ranks, row].
        side: where encodes, decodes and long forwards run and are reported.
        pace: how far it runs ahead of its device.
        groups: the processes that are this cfg rank.
        cache_bytes: of each of its two caches, of what texts and what images of requests became.
        limits: of adapters.
    """

    def __init__(
        self,
        pipeline: EnginePipeline,
        rank: int,
        ranks: int,
        all_gather: AllGather,
        side: SideWork,
        pace: Pace | None = None,
        groups: SequenceGroups = NO_GROUPS,
        cache_bytes: int = 256 * 2**20,
        limits: AdapterLimits = NO_ADAPTERS,
    ) -> None:
        self.pipeline = pipeline
        self.rank = rank
        self.ranks = ranks
        self.side = side
        self._held = HeldRequests()
        self._pace = pace or HostPace()
        self._groups = groups
        forwards = PackedForwards(pipeline, groups.steps)
        adapters = AdapterStore(pipeline, limits)
        self.beside = BesideSteps(pipeline, self._pace, forwards, groups.beside, cache_bytes, adapters)
        self._step = DenoisingStep(
            pipeline, rank, all_gather, forwards, self._held, self.beside, side, self._pace, groups.steps
        )
        self._plans: deque[UnsettledPlan] = deque()  # not yet reported

    @property
    def states(self) -> dict[int, RequestState]:
        """What is remembered of each request, by id."""
        return self._held.states

    def run(self, plan: StepPlan) -> StepReport:
        """Carry out a plan, and wait until the device has."""
        self.start(plan)
        return self.finished(wait=True)[-1]

    @property
    def is_ahead(self) -> bool:
        """Whether there are plans that the device still works on, as far as is known."""
        return bool(self._plans)

    def finished(self, wait: bool = False) -> list[StepReport]:
        """The reports of the plans that the device is done with.

        Args:
            wait: for all of them.
        """
        reports = []
        while self._plans and (wait or self._plans[0].denoised.is_reached()):
            reports.append(self._plans.popleft().report(self.rank))
        return reports

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> None:
        """Carry out a plan; on an accelerator much of it is only queued then."""
        with self._pace.stepping():
            self._carry_out(plan)

    def _carry_out(self, plan: StepPlan) -> None:
        began = self._pace.mark()
        for id in plan.retire:
            self._forget(id)
        for admission in plan.admit:
            self._admit(admission)
        for encode in plan.encodes:
            self._encode(encode)
        for embeds in plan.embeds:
            self._take_over(embeds)
        for assign in plan.assign:
            self._assign(assign)
        long = [self.states[id] for id in plan.long_steps if id in self.states]
        if long or (plan.advance and self._held.any_running):
            self._step.take(self._held.line_up(long, self.rank, self.ranks), plan.previews)
        denoised = self._pace.mark()
        for forward in plan.forwards:
            self._forward(forward)
        for asked in plan.decodes:
            self._decode(asked)
        self._plans.append(UnsettledPlan(plan.step, began, denoised, self._held.take_failures()))

    def _forget(self, id: int) -> RequestState | None:
        self.side.cancel(id)
        return self._held.forget(id)

    def _admit(self, admission: Admission) -> None:
        state = self.states[admission.id] = RequestState(admission.id, admission.request)
        try:
            if not state.request.on_all_ranks:
                state.prediction_shape = checked_shape(self.pipeline.prediction_shape(state.request))
        except Exception as error:
            self._held.note_failure(state, _PREPARING, error)  # the engine lets it join no step then
            return
        state.preparation = self.side.prepare(partial(self.beside.prepare, state, admission.kept))
        if state.preparation.done():
            self._await_preparation(state)

    def _await_preparation(self, state: RequestState) -> None:
        """Wait for a request's first latents, before it is in a step."""
        preparation, state.preparation = state.preparation, None
        if preparation is None:
            return
        try:
            preparation.result()
            self.beside.hand_over([state.latents])
        except Exception as error:
            self._held.note_failure(state, _PREPARING, error)

    def _encode(self, encode: Encode) -> None:
        state = self.states.get(encode.id)
        if encode.rank == self.rank and state is not None:
            run = partial(self.beside.encode, state, encode.branch, encode.is_shared)
            self.side.encode(encode.id, encode.branch, run, encode.is_long)

    def _take_over(self, embeds: Embeds) -> None:
        state = self.states.get(embeds.id)
        if self.rank in embeds.ranks and state is not None:
            self.side.encode(embeds.id, embeds.branch, partial(self.beside.take_over, state, embeds))

    def _assign(self, assign: Assign) -> None:
        state = self.states.get(assign.id)
        if state is not None:
            self._await_preparation(state)
            self._held.run(state, assign.owners)

    def _forward(self, forward: Forward) -> None:
        """Begin the forwards of a long request's next step."""
        state = self.states.get(forward.id)
        if state is None:
            return
        self._await_preparation(state)
        state.owners = forward.owners
        mine = [branch for branch, rank in enumerate(forward.owners) if rank == self.rank]
        if mine and not state.error:
            self.side.forward(forward.id, partial(self.beside.forward, state, mine), self._groups.beside)

    def _decode(self, asked: Decode) -> None:
        state = self._forget(asked.id)
        if self._step.is_mine(asked.id, asked.rank) and state is not None and not state.error:
            self.side.decode(asked.id, partial(self.beside.decode_final, state, asked.is_tiled), asked.is_long)
