"""One denoising step on one rank: forward this rank's branches, exchange the predictions, step every request's latents.

A failure is noted in the request's state and leaves no function here: the rank always joins the step's exchange, where
all ranks learn of it and drop the request alike. Must not import torch.distributed: the collective comes from outside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import torch

from vllm_cfg_plugin.distributed.sequence_group import SequenceGroup
from vllm_cfg_plugin.engine.plan import Preview
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline
from vllm_cfg_plugin.worker.advance import Move, combine_all, complete_all, step_all
from vllm_cfg_plugin.worker.beside import BesideSteps
from vllm_cfg_plugin.worker.exchange import AllGather, Slot, exchange_predictions
from vllm_cfg_plugin.worker.held import HeldRequests
from vllm_cfg_plugin.worker.kept_state import is_due, note, to_bytes
from vllm_cfg_plugin.worker.lineup import Lineup, branch_input, checked_prediction
from vllm_cfg_plugin.worker.out_of_memory import PackedForwards
from vllm_cfg_plugin.worker.pace import Pace
from vllm_cfg_plugin.worker.side_work import SideWork
from vllm_cfg_plugin.worker.state import RequestState
from vllm_cfg_plugin.worker.unsettled import ExchangedFlags

logger = get_logger(__name__)


class DenoisingStep:
    """Steps the requests that one rank holds.

    Args:
        rank: this process in the cfg group.
        all_gather: [row] of every rank -> [ranks, row].
        forwards: the packed forwards of this rank.
        held, beside, side: the requests, and the work on them that a step gives rise to.
        pace: how far the host runs ahead of its device.
        group: the processes that are this cfg rank, and forward together.
    """

    def __init__(
        self,
        pipeline: EnginePipeline,
        rank: int,
        all_gather: AllGather,
        forwards: PackedForwards,
        held: HeldRequests,
        beside: BesideSteps,
        side: SideWork,
        pace: Pace,
        group: SequenceGroup,
    ) -> None:
        self._pipeline = pipeline
        self._rank = rank
        self._all_gather = all_gather
        self._like = pipeline.prediction_like
        self._forwards = forwards
        self._held = held
        self._beside = beside
        self._side = side
        self._pace = pace
        self._group = group
        self._flags: deque[ExchangedFlags] = deque()  # of steps, not yet read

    def take(self, lineup: Lineup, previews: Sequence[Preview]) -> None:
        """Take a step of all requests in the lineup, on all ranks alike."""
        predictions = self._forward(lineup) | self._forwarded_beside(lineup)
        gathered = self._exchange(lineup, predictions)
        # Those that failed are forgotten by now.
        going = [
            (state, own) for state, own in zip(lineup.states, gathered, strict=True) if state.id in self._held.states
        ]
        mine = {preview.id: preview for preview in previews if self.is_mine(preview.id, preview.rank)}
        self._advance([Move(state, own) for state, own in going if not state.error], mine)
        for state, _ in going:
            self._count(state)

    def is_mine(self, id: int, rank: int) -> bool:
        """Whether this process does what one process of a cfg rank does: they take turns."""
        return rank == self._rank and id % self._group.size == self._group.rank

    # ---- forward ----

    def _forward(self, lineup: Lineup) -> dict[Slot, torch.Tensor]:
        """One packed forward of this rank's branches for each model that forwards some of them."""
        predictions = {}
        for inputs in self._group_inputs(lineup):
            for slot, outcome in zip(inputs, self._forwards.predict([*inputs.values()]), strict=True):
                state = lineup.states[slot[0]]
                try:
                    predictions[slot] = checked_prediction(outcome, state.prediction_shape)
                except Exception as error:
                    self._held.note_failure(state, "predicting its noise", error)
        return predictions

    def _forwarded_beside(self, lineup: Lineup) -> dict[Slot, torch.Tensor]:
        """This rank's predictions of long requests."""
        predictions = {}
        for slot in lineup.forwarded:
            state = lineup.states[slot[0]]
            try:
                predictions[slot] = state.predictions.pop(slot[1])
            except KeyError as error:
                self._held.note_failure(state, "looking for its prediction", error)
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
                inputs[slot] = self._pipeline.forward_group(of_branch), of_branch
            except Exception as error:
                self._held.note_failure(state, "preparing its forward", error)
        self._share_failures(lineup.states)
        groups: dict[Hashable, dict[Slot, BranchInput]] = {}
        for slot, (key, of_branch) in inputs.items():
            if not lineup.states[slot[0]].error:
                groups.setdefault(key, {})[slot] = of_branch
        return [*groups.values()]

    def _share_failures(self, states: Sequence[RequestState]) -> None:
        """All processes of a cfg rank forward the same: what one of them can't go on with, none does."""
        if self._group.size == 1:
            return
        for state, has_failed in zip(states, self._group.any([bool(state.error) for state in states]), strict=True):
            if has_failed and not state.error:
                state.error = "failed on another process of its cfg rank"  # which reports why

    # ---- exchange ----

    def _exchange(self, lineup: Lineup, mine: dict[Slot, torch.Tensor]) -> list[list[torch.Tensor]]:
        """The predictions of every request's branches, from all ranks; drops those of which a failure is known."""
        failed_here = [bool(state.error) for state in lineup.states]
        gathered, failed = exchange_predictions(
            lineup.layout, self._rank, mine, failed_here, self._like, self._all_gather
        )
        flags = ExchangedFlags([state.id for state in lineup.states], self._pace.to_host(failed), self._pace.mark())
        self._flags.append(flags)
        for state in lineup.states:
            state.last_flags = flags
        self._forget_failed()
        return gathered

    def _forget_failed(self) -> None:
        """Drop what failed on any rank, in the same step on all of them: in this one, or where the host runs ahead,
        in those before it. The steps that a request takes in between are of no use, and touch nobody else.
        """
        while len(self._flags) > self._pace.steps_ahead:
            for id in self._flags.popleft().all_failed():
                self._side.cancel(id)
                self._held.forget(id)

    # ---- advance ----

    def _advance(self, moves: Sequence[Move], previews: Mapping[int, Preview]) -> None:
        """Combine the branches and step the requests' own noise schedulers; `previews` are this rank's, by id."""
        complete_all(moves)
        combine_all(self._pipeline, moves)
        for move in moves:
            preview = previews.get(move.state.id)
            if preview is not None:
                self._preview(move, preview)
        step_all(self._pipeline, moves)
        for move in moves:
            if move.error is not None:
                self._held.note_failure(move.state, "stepping its latents", move.error)

    def _preview(self, move: Move, asked: Preview) -> None:
        state = move.state
        if move.noise is not None:
            now = state.noise_scheduler, move.noise, state.index, state.latents, asked.is_tiled
            self._side.preview(state.id, partial(self._beside.decode_estimate, state.request, *now), asked.is_long)

    def _count(self, state: RequestState) -> None:
        """The request has taken a step."""
        state.index += 1
        keeper = state.owners[0] if state.owners else 0
        if self.is_mine(state.id, keeper) and not state.error and is_due(state):
            self._keep(state)
        if state.is_denoised:
            self._held.leave(state.id)

    def _keep(self, state: RequestState) -> None:
        try:
            self._side.keep(state.id, state.index, partial(to_bytes, note(state)))
        except Exception as error:
            logger.warning("A video would begin again after a restart, as it can't be kept: %s", error)
