"""One engine step on one rank: forget, admit, assign, forward, exchange, advance; what may take long is side work.

Every rank carries out the same plan; what differs is which branches it owns, which texts it encodes and which images
it decodes. A cfg rank may be a sequence group of processes: they forward together, and decode in turn. A failure is
noted in the request's state and never leaves a verb: the rank always joins the step's exchange, where all ranks learn
of it and drop the request alike. Must not import vLLM or torch.distributed: the collectives come in from outside.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from vllm_cfg_plugin.distributed.sequence_group import NO_GROUPS, MemberFailedError, SequenceGroups, together
from vllm_cfg_plugin.engine.plan import (
    Admission,
    Assign,
    Decode,
    Embeds,
    Encode,
    Forward,
    Preview,
    StepPlan,
    StepReport,
)
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline, PromptEmbeds, generator_of
from vllm_cfg_plugin.pipelines.common.tensor_cache import TensorCache
from vllm_cfg_plugin.worker.advance import Move, combine_all, step_all
from vllm_cfg_plugin.worker.embeds import pack_embeds, unpack_embeds
from vllm_cfg_plugin.worker.estimate import estimated_final_latents
from vllm_cfg_plugin.worker.exchange import AllGather, Slot, exchange_predictions
from vllm_cfg_plugin.worker.kept_state import is_due, note, resume, to_bytes
from vllm_cfg_plugin.worker.lineup import Lineup, branch_input, checked_prediction, checked_shape
from vllm_cfg_plugin.worker.out_of_memory import PackedForwards, decode
from vllm_cfg_plugin.worker.pace import HostPace, Pace
from vllm_cfg_plugin.worker.side_work import SideWork
from vllm_cfg_plugin.worker.state import RequestState
from vllm_cfg_plugin.worker.unsettled import ExchangedFlags, UnsettledPlan

logger = get_logger(__name__)

_PREPARING = "preparing its latents"
EMBEDDING_CACHE_BYTES = 256 * 2**20
CONDITION_CACHE_BYTES = 256 * 2**20


class StepRunner:
    """Carries out step plans with one pipeline.

    Args:
        rank, ranks: this process in the cfg group.
        all_gather: [row] of every rank -> [ranks, row].
        side: where encodes, decodes and long forwards run and are reported.
        pace: how far it runs ahead of its device.
        groups: the processes that are this cfg rank.
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
    ) -> None:
        self.pipeline = pipeline
        self.rank = rank
        self.ranks = ranks
        self.side = side
        self.states: dict[int, RequestState] = {}
        self.embeddings: TensorCache[PromptEmbeds] = TensorCache(EMBEDDING_CACHE_BYTES)
        self.conditions: TensorCache[list[torch.Tensor]] = TensorCache(CONDITION_CACHE_BYTES)
        self._running: dict[int, RequestState] = {}
        self._lineup: Lineup | None = None  # of `_running`; None when that or an owner has changed
        self._failures: list[tuple[int, str]] = []  # to be reported
        self._all_gather = all_gather
        self._like = pipeline.prediction_like
        self._forwards = PackedForwards(pipeline, groups.steps)
        self._text_lock = threading.Lock()  # tokenizers serve one thread at a time
        self._pace = pace or HostPace()
        self._groups = groups
        self._flags: deque[ExchangedFlags] = deque()  # of steps, not yet read
        self._plans: deque[UnsettledPlan] = deque()  # not yet reported

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
        if long or (plan.advance and self._running):
            self._step(long, plan.previews)
        denoised = self._pace.mark()
        for forward in plan.forwards:
            self._forward_beside(forward)
        for asked in plan.decodes:
            self._decode(asked)
        failures, self._failures = self._failures, []
        self._plans.append(UnsettledPlan(plan.step, began, denoised, failures))

    # ---- requests come and go; a request that is unknown here has failed, and its retirement is on its way ----

    def _forget(self, id: int) -> RequestState | None:
        self.side.cancel(id)
        self._leave(id)
        return self.states.pop(id, None)

    def _leave(self, id: int) -> None:
        if self._running.pop(id, None) is not None:
            self._lineup = None

    def _admit(self, admission: Admission) -> None:
        state = self.states[admission.id] = RequestState(admission.id, admission.request)
        try:
            if not state.request.on_all_ranks:
                state.prediction_shape = checked_shape(self.pipeline.prediction_shape(state.request))
        except Exception as error:
            self._note_failure(state, _PREPARING, error)  # the engine lets it join no step then
            return
        state.preparation = self.side.prepare(partial(self._prepare, state, admission.kept))
        if state.preparation.done():
            self._await_preparation(state)

    def _prepare(self, state: RequestState, kept: bytes) -> None:
        """May run beside the steps."""
        state.generator = generator_of(state.request)
        state.latents = self.pipeline.draw_noise(state.request, state.generator)
        state.noise_scheduler = self.pipeline.make_noise_scheduler(state.request)
        if kept:
            resume(state, kept)

    def _await_preparation(self, state: RequestState) -> None:
        """Wait for a request's first latents, before it is in a step."""
        preparation, state.preparation = state.preparation, None
        if preparation is None:
            return
        try:
            preparation.result()
            self._hand_over([state.latents])
        except Exception as error:
            self._note_failure(state, _PREPARING, error)

    def _encode(self, encode: Encode) -> None:
        state = self.states.get(encode.id)
        if encode.rank == self.rank and state is not None:
            run = partial(self._encode_branch, state, encode.branch, encode.is_shared)
            self.side.encode(encode.id, encode.branch, run, encode.is_long)

    def _take_over(self, embeds: Embeds) -> None:
        state = self.states.get(embeds.id)
        if self.rank in embeds.ranks and state is not None:
            self.side.encode(embeds.id, embeds.branch, partial(self._unpack_embeds, state, embeds))

    def _unpack_embeds(self, state: RequestState, embeds: Embeds) -> None:
        """Runs beside the steps."""
        unpacked = unpack_embeds(embeds.data, self._like.device)
        self._hold(state, embeds.branch, unpacked)

    def _encode_branch(self, state: RequestState, branch: int, is_shared: bool = False) -> torch.Tensor | None:
        """Runs beside the steps; returns what is to be shared."""
        request = state.request

        def encode() -> PromptEmbeds:
            with self._text_lock:
                return self.pipeline.encode_branch(request, branch)

        if request.on_all_ranks:
            if (preparation := state.preparation) is not None:
                preparation.result()
            state.prompt_embeds = dict.fromkeys(range(len(request.prompts)), encode())
            state.prediction_shape = checked_shape(self.pipeline.prediction_shape(request))
            return None
        embeds = self.embeddings.get(request.embeds_key(branch), encode)
        self._hold(state, branch, embeds)
        return pack_embeds(embeds) if is_shared else None

    def _hold(self, state: RequestState, branch: int, embeds: PromptEmbeds) -> None:
        state.condition = self._condition(state.request)
        self._hand_over((*embeds.tensors, *state.condition))
        state.prompt_embeds[branch] = embeds

    def _condition(self, request: DiffusionRequest) -> list[torch.Tensor]:
        """What the request's images became."""
        if not request.images:
            return []
        # The size of the result too: some families bring the images to it.
        key = (*request.condition_key, request.height, request.width, request.num_frames)
        return self.conditions.get(key, partial(self.pipeline.encode_images, request))

    def _assign(self, assign: Assign) -> None:
        state = self.states.get(assign.id)
        if state is not None:
            self._await_preparation(state)
            state.owners = assign.owners
            self._running[assign.id] = state
            self._lineup = None

    def _decode(self, asked: Decode) -> None:
        state = self._forget(asked.id)
        if self._is_mine(asked.id, asked.rank) and state is not None and not state.error:
            self.side.decode(asked.id, partial(self._decode_final, state), asked.is_long)

    def _is_mine(self, id: int, rank: int) -> bool:
        """Whether this process does what one process of a cfg rank does: they take turns."""
        return rank == self.rank and id % self._groups.steps.size == self._groups.steps.rank

    def _decode_final(self, state: RequestState) -> torch.Tensor:
        """Runs beside the steps."""
        if state.last_flags is not None and state.last_flags.failed(state.id):
            raise RuntimeError("another rank could not take its last step")
        return self._decode_latents(state.request, state.latents)

    def _decode_latents(self, request: DiffusionRequest, latents: torch.Tensor) -> torch.Tensor:
        """Runs beside the steps."""
        if not torch.isfinite(latents).all():
            raise ArithmeticError("its latents are not finite (NaN or infinity)")
        condition = self._condition(request) if self.pipeline.decode_sees_images else []
        return decode(self.pipeline, latents, request, condition).contiguous()

    def _decode_estimate(
        self, request: DiffusionRequest, noise_scheduler: Any, noise: torch.Tensor, index: int, latents: torch.Tensor
    ) -> torch.Tensor:
        """Runs beside the steps."""
        return self._decode_latents(request, estimated_final_latents(noise_scheduler, noise, index, latents))

    def _forward_beside(self, forward: Forward) -> None:
        state = self.states.get(forward.id)
        if state is None:
            return
        self._await_preparation(state)
        state.owners = forward.owners
        mine = [branch for branch, rank in enumerate(forward.owners) if rank == self.rank]
        if mine and not state.error:
            self.side.forward(forward.id, partial(self._forward_branches, state, mine), self._groups.beside)

    def _forward_branches(self, state: RequestState, branches: Iterable[int]) -> None:
        """Runs beside the steps; one after the other, as long ones gain nothing from sharing a forward."""
        with together(self._groups.beside):
            for branch in branches:
                (outcome,) = self._forwards.forward([branch_input(state, branch)])
                prediction = checked_prediction(outcome, state.prediction_shape)
                self._hand_over([prediction])
                state.predictions[branch] = prediction

    # ---- one denoising step of all running requests, and of long ones whose forwards are done ----

    def _step(self, long: Sequence[RequestState], previews: Sequence[Preview]) -> None:
        if long:
            lineup = self._line_up(long)
        else:
            self._lineup = lineup = self._lineup or self._line_up(())
        predictions = self._forward(lineup)
        for slot in lineup.forwarded:
            state = lineup.states[slot[0]]
            try:
                predictions[slot] = state.predictions.pop(slot[1])
            except KeyError as error:
                self._note_failure(state, "looking for its prediction", error)
        mine = {preview.id: preview for preview in previews if self._is_mine(preview.id, preview.rank)}
        self._exchange_and_advance(lineup, predictions, mine)

    def _line_up(self, long: Sequence[RequestState]) -> Lineup:
        return Lineup.of([*self._running.values()], long, self.rank, self.ranks)

    def _forward(self, lineup: Lineup) -> dict[Slot, torch.Tensor]:
        """One packed forward of this rank's branches for each model that forwards some of them."""
        predictions = {}
        for inputs in self._group_inputs(lineup):
            for slot, outcome in zip(inputs, self._forwards.predict([*inputs.values()]), strict=True):
                state = lineup.states[slot[0]]
                try:
                    predictions[slot] = checked_prediction(outcome, state.prediction_shape)
                except Exception as error:
                    self._note_failure(state, "predicting its noise", error)
        return predictions

    def _group_inputs(self, lineup: Lineup) -> list[dict[Slot, BranchInput]]:
        """What this rank forwards, one group for each model."""
        inputs: dict[Slot, tuple[Hashable, BranchInput]] = {}
        for slot in lineup.mine:
            position, branch = slot
            state = lineup.states[position]
            if state.error:
                continue
            try:
                of_branch = branch_input(state, branch)
                inputs[slot] = self.pipeline.forward_group(of_branch), of_branch
            except Exception as error:
                self._note_failure(state, "preparing its forward", error)
        self._share_failures(lineup.states)
        groups: dict[Hashable, dict[Slot, BranchInput]] = {}
        for slot, (key, of_branch) in inputs.items():
            if not lineup.states[slot[0]].error:
                groups.setdefault(key, {})[slot] = of_branch
        return [*groups.values()]

    def _share_failures(self, states: Sequence[RequestState]) -> None:
        """All processes of a cfg rank forward the same: what one of them can't go on with, none does."""
        group = self._groups.steps
        if group.size == 1:
            return
        for state, has_failed in zip(states, group.any([bool(state.error) for state in states]), strict=True):
            if has_failed and not state.error:
                state.error = "failed on another process of its cfg rank"  # which reports why

    def _exchange_and_advance(
        self, lineup: Lineup, mine: dict[Slot, torch.Tensor], previews: dict[int, Preview]
    ) -> None:
        """Exchange predictions, then step every request's latents on every rank; `previews` are this rank's, by id."""
        failed_here = [bool(state.error) for state in lineup.states]
        gathered, failed = exchange_predictions(
            lineup.layout, self.rank, mine, failed_here, self._like, self._all_gather
        )
        flags = ExchangedFlags([state.id for state in lineup.states], self._pace.to_host(failed), self._pace.mark())
        self._flags.append(flags)
        self._forget_failed()
        going = [(state, own) for state, own in zip(lineup.states, gathered, strict=True) if state.id in self.states]
        self._advance([Move(state, own) for state, own in going if not state.error], previews)
        for state, _ in going:
            state.last_flags = flags
            state.index += 1
            if self._is_mine(state.id, state.owners[0]) and not state.error and is_due(state):
                self._keep(state)
            if state.is_denoised:
                self._leave(state.id)

    def _forget_failed(self) -> None:
        """Drop what failed on any rank, in the same step on all of them: in this one, or where the host runs ahead,
        in those before it. The steps that a request takes in between are of no use, and touch nobody else.
        """
        while len(self._flags) > self._pace.steps_ahead:
            for id in self._flags.popleft().all_failed():
                self._forget(id)

    def _keep(self, state: RequestState) -> None:
        try:
            self.side.keep(state.id, state.index, partial(to_bytes, note(state)))
        except Exception as error:
            logger.warning("A video would begin again after a restart, as it can't be kept: %s", error)

    def _advance(self, moves: Sequence[Move], previews: dict[int, Preview]) -> None:
        """Combine the branches and step the requests' own noise schedulers."""
        combine_all(self.pipeline, moves)
        for move in moves:
            state = move.state
            if (preview := previews.get(state.id)) is not None and move.noise is not None:
                now = state.noise_scheduler, move.noise, state.index, state.latents
                self.side.preview(state.id, partial(self._decode_estimate, state.request, *now), preview.is_long)
        step_all(self.pipeline, moves)
        for move in moves:
            if move.error is not None:
                self._note_failure(move.state, "stepping its latents", move.error)

    def _note_failure(self, state: RequestState, doing: str, error: Exception) -> None:
        logger.error("A request failed while %s", doing, exc_info=error)
        if state.error:  # its other branch may have failed just before
            return
        state.error = f"failed while {doing}: {type(error).__name__}: {error}"
        if not isinstance(error, MemberFailedError):  # which reports why
            self._failures.append((state.id, state.error))

    def _hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """What was made beside the steps is read in them."""
        for tensor in tensors:
            self._pace.hand_over(tensor)
