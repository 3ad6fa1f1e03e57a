"""`CFGParallelMixin`: classifier-free guidance for a pipeline, its branches spread over the cfg ranks.

A pipeline inherits from the mixin and calls two methods in its denoising loop; the same loop then runs on one rank or
on many. Every formula and every call of the model is a method of its own, for a pipeline to override.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch

from vllm_cfg_plugin import guidance
from vllm_cfg_plugin.distributed import collectives
from vllm_cfg_plugin.distributed.parallel_state import (
    get_cfg_group,
    get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size,
    get_forward_coordinator,
)
from vllm_cfg_plugin.distributed.sequence_group import current_group, together

logger = logging.getLogger(__name__)

Kwargs = dict[str, Any]
T = TypeVar("T")


class CFGParallelMixin:
    """Adds CFG-Parallel to a pipeline that has a `transformer` and a diffusers noise `scheduler`.

    With a cfg world of one rank, all branches run on it, one after the other. With more, rank 0 forwards the positive
    branch and rank 1 the negative one; ranks without a branch only take part in the collectives. All ranks end each
    step with the same latents.

    Attributes:
        channel_dim: dimension of a prediction that holds the channels of a token.
    """

    channel_dim: ClassVar[int] = -1

    transformer: Any
    scheduler: Any

    def predict_noise(self, **kwargs: Any) -> torch.Tensor:
        """One forward of the transformer; override it for another model or another call.

        Args:
            **kwargs: the transformer's arguments.
        """
        return self.transformer(**kwargs)[0]

    def predict_noise_maybe_with_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: float,
        positive_kwargs: Kwargs,
        negative_kwargs: Kwargs | None,
        cfg_normalize: bool = True,
        output_slice: int | None = None,
    ) -> torch.Tensor:
        """The prediction of one step, guided if `do_true_cfg`; the same on every rank.

        Args:
            do_true_cfg: whether this step is guided. If not, only the positive branch runs.
            true_cfg_scale: guidance scale.
            positive_kwargs, negative_kwargs: arguments of `predict_noise` for the two branches; the negative ones may
                be None where the step is not guided.
            cfg_normalize: passed on to `combine_cfg_noise`.
            output_slice: keep only the first so many tokens, `[:, :output_slice]`: an editing pipeline's generated
                image.

        Raises:
            ValueError: a guided step without `negative_kwargs`.
            RequestFailedError: another rank failed or predicted another shape; no rank is left waiting.
        """
        if do_true_cfg and negative_kwargs is None:
            raise ValueError(
                "negative_kwargs=None is not valid with do_true_cfg=True: pass the negative branch's arguments"
            )
        branches = [positive_kwargs] if negative_kwargs is None else [positive_kwargs, negative_kwargs]
        return self.predict_noise_with_multi_branch_cfg(
            do_true_cfg, true_cfg_scale, branches, cfg_normalize, output_slice
        )

    def predict_noise_with_multi_branch_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: Any,
        branches_kwargs: Sequence[Kwargs],
        cfg_normalize: bool = False,
        output_slice: int | None = None,
    ) -> torch.Tensor:
        """As `predict_noise_maybe_with_cfg`, of any number of branches: rank r forwards branches r, r + ranks, ...

        Args:
            true_cfg_scale: as `combine_multi_branch_cfg_noise` reads it.
            branches_kwargs: arguments of `predict_noise` for each branch, the positive one first.
        """

        def forward(branches: Sequence[int]) -> list[torch.Tensor]:
            predictions = (self.predict_noise(**branches_kwargs[branch]) for branch in branches)
            return [prediction if output_slice is None else prediction[:, :output_slice] for prediction in predictions]

        predictions = predict_on_ranks(len(branches_kwargs) if do_true_cfg else 1, forward)
        if not do_true_cfg:
            return predictions[0]
        return self.combine_multi_branch_cfg_noise(predictions, true_cfg_scale, cfg_normalize)

    def combine_multi_branch_cfg_noise(
        self, predictions: Sequence[torch.Tensor], true_cfg_scale: Any, cfg_normalize: bool = False
    ) -> torch.Tensor:
        """The guided prediction of all branches; override it for more than two.

        Args:
            predictions: [batch, tokens, channels] of each branch, the positive one first.
            true_cfg_scale: a number; an override may take several scales in any form.

        Raises:
            ValueError: more than two branches, and no override.
        """
        if len(predictions) != 2:
            raise ValueError(
                f"{type(self).__name__} does not say how {len(predictions)} branches are combined: override "
                "combine_multi_branch_cfg_noise"
            )
        positive, negative = predictions
        return self.combine_cfg_noise(positive, negative, true_cfg_scale, cfg_normalize)

    def combine_cfg_noise(
        self,
        noise_pred: torch.Tensor,
        neg_noise_pred: torch.Tensor,
        true_cfg_scale: float,
        cfg_normalize: bool | float = False,
    ) -> torch.Tensor:
        """The guided prediction of two branches, normalised by `cfg_normalize_function` if `cfg_normalize`.

        Args:
            noise_pred, neg_noise_pred: the positive and the negative prediction, [batch, tokens, channels].
            cfg_normalize: a number is handed on to a `cfg_normalize_function` that takes one.
        """
        combined = guidance.classifier_free_guidance(noise_pred, neg_noise_pred, true_cfg_scale)
        if not cfg_normalize:
            return combined
        number = () if cfg_normalize is True else (cfg_normalize,)
        return self.cfg_normalize_function(noise_pred, combined, *number)

    def cfg_normalize_function(self, noise_pred: torch.Tensor, comb_pred: torch.Tensor) -> torch.Tensor:
        """Bring the combined prediction to the positive one's norm, token by token; override for another rule."""
        return guidance.rescale_to_norm(noise_pred, comb_pred, self.channel_dim)

    def scheduler_step(self, noise_pred: torch.Tensor, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents after one step of the noise scheduler; override for another call of it."""
        return self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

    def scheduler_step_maybe_with_cfg(
        self, noise_pred: torch.Tensor, t: torch.Tensor, latents: torch.Tensor, do_true_cfg: bool
    ) -> torch.Tensor:
        """The latents after one step, the same on every rank: rank 0 steps and the others receive its result.

        Args:
            do_true_cfg: whether the step was guided. Latents are synchronised either way: only rank 0's noise scheduler
                advances, so a pipeline may switch guidance on and off between steps.

        Raises:
            RequestFailedError: rank 0 could not step.
        """
        sharers = get_forward_coordinator()
        if get_classifier_free_guidance_world_size() == 1 and sharers is None:
            return self.scheduler_step(noise_pred, t, latents)
        stepped: torch.Tensor | None = None
        error: Exception | None = None
        if get_classifier_free_guidance_rank() == 0:
            try:
                stepped = self.scheduler_step(noise_pred, t, latents)
            except Exception as caught:
                error = caught
        latents = collectives.broadcast_first(get_cfg_group(), stepped, error, latents.device)
        if sharers is None:
            return latents
        mine = latents if sharers.rank_in_group == 0 else None
        return collectives.broadcast_first(sharers, mine, None, latents.device)


def predict_on_ranks(branches: int, forward: Callable[[Sequence[int]], Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The predictions of all branches of a step, on every rank, in branch order.

    Rank r forwards branches r, r + ranks, ... Where there is one branch alone, every rank forwards it.

    Args:
        branches: how many there are.
        forward: predictions of the branches with these numbers; of one shape and dtype. Ranks that share forwards call
            it together.

    Raises:
        RequestFailedError: another rank failed or predicted another shape; no rank is left waiting.
    """
    ranks, rank = get_classifier_free_guidance_world_size(), get_classifier_free_guidance_rank()
    if ranks == 1 or branches == 1:
        if ranks > 1:
            log_once("CFG-Parallel is idle: these steps run without guidance, so every rank computes the same branch")
        return _forward_together(forward, range(branches))
    own: dict[int, torch.Tensor] = {}
    error: Exception | None = None
    try:
        mine = range(rank, branches, ranks)
        own = dict(zip(mine, _forward_together(forward, mine) if mine else [], strict=True))
    except Exception as caught:  # the other ranks are waiting: tell them before raising
        error = caught
    predictions: list[torch.Tensor] = []
    for first in range(0, branches, ranks):
        count = min(ranks, branches - first)
        predictions += collectives.gather_first(get_cfg_group(), count, own.get(first + rank), error)
    return predictions


def _forward_together(
    forward: Callable[[Sequence[int]], Sequence[torch.Tensor]], branches: Sequence[int]
) -> list[torch.Tensor]:
    """The predictions of branches, by all ranks that share this one's forwards."""
    group = current_group()
    trades = group.trades
    with together(group):
        predictions = list(forward(branches))
    if group.size > 1 and group.trades == trades:
        log_once(
            "sequence and tensor parallelism are idle: this transformer has no packed forward, so every rank of the "
            "group computes all of it"
        )
    return predictions


def same_on_all_ranks(value: T) -> T:
    """Rank 0's tensor or plain data on every rank of its groups, for what ranks draw without a common seed."""
    groups = [get_cfg_group()] if get_classifier_free_guidance_world_size() > 1 else []
    sharers = get_forward_coordinator()
    groups += [] if sharers is None else [sharers]
    for group in groups:
        if isinstance(value, torch.Tensor):
            value = group.broadcast(value.contiguous(), src=0)
        else:
            value = group.broadcast_object(value, src=0)
    return value


@cache
def log_once(message: str) -> None:
    """Log a message the first time it comes up in this process."""
    logger.warning(message)
