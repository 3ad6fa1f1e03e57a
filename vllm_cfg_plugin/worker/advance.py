"""What ends a denoising step: a request's branches are completed by its cache and combined, and its latents stepped.

The pipeline's hooks do both, request by request. Where no hook is overridden and both are of the plainest kind, they
are done for all such requests at once: torch's `_foreach` functions apply an operation to each of many tensors of any
sizes, by one kernel on a GPU and with the same bits as one by one. Must not import vLLM or torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_cfg_plugin.distributed.cfg_parallel import CFGParallelMixin
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.pipelines.base import EnginePipeline
from vllm_cfg_plugin.pipelines.common.step_cache import complete
from vllm_cfg_plugin.worker.state import RequestState

logger = get_logger(__name__)


@dataclass
class Move:
    """One request's part of a step.

    Attributes:
        predictions: of its branches, in their order; at first those that were forwarded.
        noise: their combination.
        error: why it could not be combined or stepped.
    """

    state: RequestState
    predictions: Sequence[torch.Tensor]
    noise: torch.Tensor | None = None
    error: Exception | None = None

    @property
    def timestep(self) -> torch.Tensor:
        timestep: torch.Tensor = self.state.noise_scheduler.timesteps[self.state.index]
        return timestep


def complete_all(moves: Sequence[Move]) -> None:
    """Add to the predictions of every request those that its cache stands in for; sets `error` where it can't."""
    for move in moves:
        if move.state.request.cache is not None:
            _alone(move, _complete)


def combine_all(pipeline: EnginePipeline, moves: Sequence[Move]) -> None:
    """Combine the branches of every request that has no error: sets `noise`, or `error`."""
    able = [move for move in moves if move.error is None]
    _together([move for move in able if _is_plain_guidance(pipeline, move)], lambda some: _guide(pipeline, some))
    for move in able:
        if move.noise is None:
            _alone(move, lambda move: _combine(pipeline, move))


def step_all(pipeline: EnginePipeline, moves: Sequence[Move]) -> None:
    """Step the latents of every request that has no error; sets that of one that can't be stepped."""
    able = [move for move in moves if move.error is None]
    done = _together([move for move in able if _is_plain_euler(pipeline, move)], _step_euler)
    for move in able:
        if move not in done:
            _alone(move, lambda move: _step(pipeline, move))


def _together(moves: list[Move], act: Callable[[list[Move]], None]) -> list[Move]:
    """Those of some moves that were done at once: all, or none where that fails."""
    if len(moves) < 2:
        return []
    try:
        act(moves)
    except Exception as error:
        logger.warning("%d requests are stepped one by one: %s", len(moves), error)
        return []
    return moves


def _alone(move: Move, act: Callable[[Move], None]) -> None:
    try:
        act(move)
    except Exception as error:
        move.error = error


def _complete(move: Move) -> None:
    state = move.state
    move.predictions = complete(state.history, state.request, state.index, move.predictions)


def _combine(pipeline: EnginePipeline, move: Move) -> None:
    state = move.state
    move.noise = pipeline.combine_branches(move.predictions, state.request, move.timestep, state.index)


def _step(pipeline: EnginePipeline, move: Move) -> None:
    state = move.state
    noise: Any = move.noise  # None left an error
    state.latents = pipeline.step_latents(state.noise_scheduler, noise, move.timestep, state.latents, state.generator)


# ---- classifier-free guidance of two branches, and nothing more ----


def _is_plain_guidance(pipeline: EnginePipeline, move: Move) -> bool:
    asked = move.state.request.guidance
    return (
        len(move.predictions) == 2
        and asked.rule == "cfg"
        and not (asked.normalize or asked.rescale)
        and _is_own(pipeline.combine_branches, EnginePipeline.combine_branches)
        and _is_own(pipeline.combine_cfg_noise, CFGParallelMixin.combine_cfg_noise)
    )


def _guide(pipeline: EnginePipeline, moves: list[Move]) -> None:
    """`negative + scale * (positive - negative)`, as in `guidance.classifier_free_guidance`."""
    scales = [pipeline.guidance_scale_at(move.state.request, move.timestep) for move in moves]
    positives, negatives = ([move.predictions[branch] for move in moves] for branch in (0, 1))
    combined = torch._foreach_sub(positives, negatives)
    torch._foreach_mul_(combined, scales)
    torch._foreach_add_(combined, negatives)
    for move, noise in zip(moves, combined, strict=True):
        move.noise = noise


# ---- diffusers' Euler steps of flow matching, without noise ----


def _is_plain_euler(pipeline: EnginePipeline, move: Move) -> bool:
    scheduler, noise = move.state.noise_scheduler, move.noise
    return (
        noise is not None
        and (type(scheduler).__module__, type(scheduler).__name__) == _EULER
        and not scheduler.config.stochastic_sampling
        # Of fewer bits torch rounds otherwise on a CPU.
        and (noise.is_cuda or noise.dtype == move.state.latents.dtype == torch.float32)
        and noise.shape == move.state.latents.shape
        and _is_own(pipeline.step_latents, EnginePipeline.step_latents)
    )


_EULER = ("diffusers.schedulers.scheduling_flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler")


def _step_euler(moves: list[Move]) -> None:
    """`latents + (next sigma - sigma) * noise` in float32, as in the noise scheduler's own `step`."""
    schedulers = [move.state.noise_scheduler for move in moves]
    for scheduler, move in zip(schedulers, moves, strict=True):
        if scheduler.step_index is None:
            scheduler._init_step_index(move.timestep)
    noises: Any = [move.noise for move in moves]
    changes = [*torch._foreach_mul(noises, [_width(scheduler) for scheduler in schedulers])]
    stepped = _as_dtype(changes, [torch.float32] * len(moves))
    torch._foreach_add_(stepped, _as_dtype([move.state.latents for move in moves], [torch.float32] * len(moves)))
    stepped = _as_dtype(stepped, [noise.dtype for noise in noises])
    for scheduler, move, latents in zip(schedulers, moves, stepped, strict=True):
        scheduler._step_index += 1
        move.state.latents = latents


def _width(scheduler: Any) -> float:
    """How far the noise scheduler's next step goes; it keeps its sigmas on the CPU."""
    return float(scheduler.sigmas[scheduler.step_index + 1] - scheduler.sigmas[scheduler.step_index])


def _as_dtype(tensors: list[torch.Tensor], dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    """The tensors in other dtypes, copied at once; as they are where all have theirs."""
    if all(tensor.dtype == dtype for tensor, dtype in zip(tensors, dtypes, strict=True)):
        return tensors
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(copies, tensors)
    return copies


def _is_own(method: Any, own: Any) -> bool:
    """Whether a bound method is a class's own: nothing overrides it."""
    return getattr(method, "__func__", None) is own
