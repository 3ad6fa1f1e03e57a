"""One engine step on one rank: forget, admit, encode, forward, exchange, advance, decode.

Every rank carries out the same plan; what differs is which branches it owns and which images it decodes. A failure is
noted in the request's state and never leaves a verb: the rank always joins the step's exchange, where all ranks learn
of it. Must not import vLLM or torch.distributed: the collective comes in as a function.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from vllm_cfg_plugin.engine.plan import Decode, DecodedImage, Forward, StepPlan, StepReport
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline
from vllm_cfg_plugin.worker.exchange import AllGather, ExchangeLayout, exchange_predictions
from vllm_cfg_plugin.worker.state import EmbeddingCache, RequestState

logger = get_logger(__name__)

EMBEDDING_CACHE_BYTES = 256 * 2**20


class StepRunner:
    """Carries out step plans with one pipeline.

    Args:
        rank, ranks: this process in the cfg group.
        all_gather: [row] of every rank -> [ranks, row].
    """

    def __init__(self, pipeline: EnginePipeline, rank: int, ranks: int, all_gather: AllGather) -> None:
        self.pipeline = pipeline
        self.rank = rank
        self.ranks = ranks
        self.states: dict[int, RequestState] = {}
        self.embeddings = EmbeddingCache(pipeline.encode_branch, EMBEDDING_CACHE_BYTES)
        self._all_gather = all_gather
        self._like = next(pipeline.transformer.parameters())  # has the predictions' dtype and device

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> tuple[StepReport, list[memoryview]]:
        """Carry out a plan; returns the report and the pixels of its images, uint8 [height, width, 3] each."""
        began = time.monotonic()
        self._retire(plan)
        self._admit(plan)
        encoded = self._encode(plan.forwards)
        predictions = self._forward(plan.forwards)
        self._exchange_and_advance(plan.forwards, predictions)
        denoised = time.monotonic()
        images, pixels = self._decode(plan.decodes)
        failed = self._failures(plan)
        for decode in plan.decodes:
            del self.states[decode.id]
        return StepReport(plan.step, self.rank, began, denoised, encoded, failed, images), pixels

    def _retire(self, plan: StepPlan) -> None:
        for id in plan.retire:
            self.states.pop(id, None)

    def _admit(self, plan: StepPlan) -> None:
        for admission in plan.admit:
            state = self.states[admission.id] = RequestState(admission.request)
            try:
                state.latents = self.pipeline.draw_noise(state.request)
                state.noise_scheduler = self.pipeline.make_noise_scheduler(state.request)
            except Exception as error:
                _note_failure(state, "preparing its latents", error)

    def _encode(self, forwards: Sequence[Forward]) -> list[tuple[int, float]]:
        """Encode the prompts of branches that this rank owns and has not seen; milliseconds per request."""
        encoded = []
        for forward in forwards:
            state = self.states[forward.id]
            missing = [] if state.error else self._missing_branches(forward, state)
            if not missing:
                continue
            began = time.monotonic()
            try:
                for branch in missing:
                    state.prompt_embeds[branch] = self.embeddings.get(state.request.prompts[branch])
            except Exception as error:
                _note_failure(state, "encoding its prompt", error)
            encoded.append((forward.id, 1e3 * (time.monotonic() - began)))
        return encoded

    def _missing_branches(self, forward: Forward, state: RequestState) -> list[int]:
        return [b for b, owner in enumerate(forward.owners) if owner == self.rank and b not in state.prompt_embeds]

    def _forward(self, forwards: Sequence[Forward]) -> dict[tuple[int, int], torch.Tensor]:
        """One packed forward of this rank's branches: (position in the plan, branch) -> prediction."""
        work: list[tuple[tuple[int, int], BranchInput]] = []
        for index, forward in enumerate(forwards):
            state = self.states[forward.id]
            if state.error:
                continue
            for branch, owner in enumerate(forward.owners):
                if owner == self.rank:
                    work.append(((index, branch), _branch_input(state, forward, branch)))
        # Neighbours of equal shape share an attention call; the order changes no sequence's result.
        work.sort(key=lambda item: (item[1].latents.shape[1], item[1].prompt_embeds.shape[0]))
        predictions = {}
        for (slot, _), outcome in zip(work, self._predict([inputs for _, inputs in work]), strict=True):
            if isinstance(outcome, Exception):
                _note_failure(self.states[forwards[slot[0]].id], "predicting its noise", outcome)
            else:
                predictions[slot] = outcome
        return predictions

    def _predict(self, inputs: Sequence[BranchInput]) -> list[torch.Tensor | Exception]:
        """Predict all in one call; if that fails, in halves, down to the one that fails alone."""
        if not inputs:
            return []
        try:
            prediction = self.pipeline.predict_noise(**self.pipeline.pack_branches(inputs))
            return [*self.pipeline.unpack_predictions(prediction, inputs)]
        except Exception as error:
            if len(inputs) == 1:
                return [error]
            logger.warning("A packed forward of %d branches failed and is split: %s", len(inputs), error)
            if isinstance(error, torch.OutOfMemoryError) and inputs[0].latents.is_cuda:
                torch.cuda.empty_cache()
        # Outside the except block, so that the failed call's tensors are free before the halves are tried.
        middle = len(inputs) // 2
        return self._predict(inputs[:middle]) + self._predict(inputs[middle:])

    def _exchange_and_advance(self, forwards: Sequence[Forward], mine: dict[tuple[int, int], torch.Tensor]) -> None:
        """Exchange predictions, then step every request's latents on every rank."""
        if not forwards:
            return
        states = [self.states[forward.id] for forward in forwards]
        shapes = [self.pipeline.exchange_shape(state.request) for state in states]
        layout = ExchangeLayout.of(forwards, [tokens * channels for tokens, channels in shapes], self.ranks)
        gathered, failed = exchange_predictions(
            layout,
            self.rank,
            mine,
            [bool(state.error) for state in states],
            shapes,
            self._like,
            self._all_gather,
        )
        for forward, state, predictions, has_failed in zip(forwards, states, gathered, failed, strict=True):
            if has_failed:
                state.error = state.error or "another cfg rank could not go on with it"
                continue
            try:
                self._advance(state, forward.index, predictions)
            except Exception as error:
                _note_failure(state, "stepping its latents", error)

    def _advance(self, state: RequestState, index: int, predictions: Sequence[torch.Tensor]) -> None:
        """Combine the branches and step the request's own noise scheduler, through the pipeline's hooks."""
        noise = predictions[0]
        if len(predictions) > 1:
            noise = self.pipeline.combine_cfg_noise(
                predictions[0], predictions[1], state.request.true_cfg_scale, self.pipeline.cfg_normalize
            )
        # The hook's signature is the seed's: it steps `self.scheduler`, which is the request's for this call.
        own, self.pipeline.scheduler = self.pipeline.scheduler, state.noise_scheduler
        try:
            timestep = state.noise_scheduler.timesteps[index]
            state.latents = self.pipeline.scheduler_step(noise, timestep, state.latents)
        finally:
            self.pipeline.scheduler = own

    def _decode(self, decodes: Sequence[Decode]) -> tuple[list[DecodedImage], list[memoryview]]:
        images, pixels = [], []
        for decode in decodes:
            state = self.states[decode.id]
            if decode.rank != self.rank or state.error:
                continue
            began = time.monotonic()
            try:
                if not torch.isfinite(state.latents).all():
                    raise ArithmeticError("its latents are not finite (NaN or infinity)")
                image = self.pipeline.decode(state.latents, state.request).contiguous()
            except Exception as error:
                _note_failure(state, "decoding its image", error)
                continue
            height, width, _ = image.shape
            images.append(DecodedImage(decode.id, height, width, 1e3 * (time.monotonic() - began)))
            pixels.append(image.numpy().data.cast("B"))
        return images, pixels

    def _failures(self, plan: StepPlan) -> list[tuple[int, str]]:
        """Requests of this plan that can't go on; a request that is decoded was forwarded in the same plan."""
        return [(forward.id, error) for forward in plan.forwards if (error := self.states[forward.id].error)]


def _branch_input(state: RequestState, forward: Forward, branch: int) -> BranchInput:
    return BranchInput(
        latents=state.latents,
        prompt_embeds=state.prompt_embeds[branch],
        timestep=state.noise_scheduler.timesteps[forward.index],
        height=state.request.height,
        width=state.request.width,
    )


def _note_failure(state: RequestState, doing: str, error: Exception) -> None:
    logger.error("A request failed while %s", doing, exc_info=error)
    state.error = f"failed while {doing}: {type(error).__name__}: {error}"
