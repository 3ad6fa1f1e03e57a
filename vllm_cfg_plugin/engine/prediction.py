"""How long a request will take, by the cost model; pure. Must not import torch or vLLM."""

from __future__ import annotations

from collections import Counter

from vllm_cfg_plugin.engine.cost import CostModel
from vllm_cfg_plugin.params import DiffusionRequest


def predicted_seconds(request: DiffusionRequest, results: int, cost: CostModel, ranks: int) -> float:
    """Seconds that one engine with nothing else to do takes for so many results of a request.

    They step together: a rank forwards its share of all branches, and at least one of them.
    """
    branches = range(len(request.prompts))
    forwards = [cost.forward(request.sequence_tokens(branch)) for branch in branches]
    steps = Counter(map(request.branches_at, range(request.steps)))  # branches that are forwarded -> in how many
    encodes = [cost.encode(request.text_tokens[branch]) for branch in branches]  # once for all results
    decode = cost.decode(request.image_tokens)
    microseconds = (
        _shared(encodes, ranks)
        + sum(
            times * (cost.step_us + _shared(forwards[:branches] * results, ranks)) for branches, times in steps.items()
        )
        + _shared([decode] * results, ranks)
    )
    return microseconds / 1e6


def _shared(costs: list[int], ranks: int) -> float:
    """What the slowest rank does of it, at best."""
    return max(max(costs, default=0), sum(costs) / ranks)
