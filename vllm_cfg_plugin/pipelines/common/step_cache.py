"""What stands in for predictions that a request's cache of steps spares; pure functions of tensors.

`params.StepCache` says which steps are spared. All ranks have all predictions after a step's exchange, so all of them
keep the same history and make the same of it, whichever of them forwarded a branch. Must not import vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from vllm_cfg_plugin.params import DiffusionRequest

# branch -> (step, prediction [1, ...]) of the last ones that were computed, oldest first
History = dict[int, list[tuple[int, torch.Tensor]]]


def complete(
    history: History, request: DiffusionRequest, step: int, computed: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """All predictions that a step needs, [1, ...] each: those that were computed, and what stands in for the others.

    Args:
        history: of the request; what was computed is noted in it.
        computed: predictions of the branches that were forwarded, from branch 0 on.
    """
    if request.cache is None:
        return [*computed]
    for branch, prediction in enumerate(computed):
        # A copy: the one that was exchanged is a part of all that was.
        points = [*history.get(branch, ()), (step, prediction.clone())]
        history[branch] = points[-request.cache.order - 1 :]
    spared = range(len(computed), request.branches_needed_at(step))
    return [*computed, *(extrapolate(history[branch], step) for branch in spared)]


def extrapolate(points: Sequence[tuple[int, torch.Tensor]], step: int) -> torch.Tensor:
    """The value at a step of the polynomial through all points, in Lagrange's form; of one point, that one.

    It is Newton's form of what TaylorSeer (https://arxiv.org/abs/2503.06923) does with differences of features. Fewer
    points than the cache's order asks for, as there are at first, give one of lower degree.
    """
    if len(points) == 1:
        return points[0][1]
    places = [place for place, _ in points]
    weights = [prod((step - other) / (place - other) for other in places if other != place) for place in places]
    terms = [weight * value.float() for weight, (_, value) in zip(weights, points, strict=True)]
    return sum(terms[1:], start=terms[0]).to(points[0][1].dtype)
