"""NCCL's rules, kept on gloo: a collective that NCCL would hang in, or answer with garbage, fails on every rank.

NCCL trusts its caller: all ranks of a group must call the same collectives in the same order, with contiguous tensors
of one shape and dtype. Inside `nccl_rules` the ranks tell each other over their CPU group, before each collective of
their device group, what they are about to call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from vllm_cfg_plugin.distributed.parallel_state import get_cfg_group, get_classifier_free_guidance_world_size

# What vLLM's coordinator of a group calls for the tensors of a GPU.
_COLLECTIVES = ("all_gather_into_tensor", "all_gather", "broadcast", "all_reduce")
_DTYPES = {
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.int8,
}


class BrokenRuleError(AssertionError):
    """Ranks differ in what they call, or one calls what NCCL can't do."""


@contextmanager
def nccl_rules() -> Iterator[None]:
    """Keep the rules inside, for the cfg group's device group."""
    calls = count()
    with ExitStack() as stack:
        for name in _COLLECTIVES:
            stack.enter_context(patch.object(dist, name, _checked(name, getattr(dist, name), calls)))
        yield


def _checked(name: str, collective: Callable[..., Any], calls: Iterator[int]) -> Callable[..., Any]:
    def call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
        if get_classifier_free_guidance_world_size() > 1 and group is get_cfg_group().device_group:
            _compare(next(calls), name, args, kwargs)
        return collective(*args, group=group, **kwargs)

    return call


def _compare(number: int, name: str, args: Any, kwargs: dict[str, Any]) -> None:
    group = get_cfg_group()
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    mine = [number, name, [(str(tensor.dtype), [*tensor.shape]) for tensor in tensors], sorted(kwargs.items())]
    problems = [
        f"{name} of a tensor that {problem}"
        for tensor in tensors
        for problem, broken in (
            ("is not contiguous", not tensor.is_contiguous()),
            (f"has the dtype {tensor.dtype}", tensor.dtype not in _DTYPES),
        )
        if broken
    ]
    told: list[Any] = [None] * group.world_size
    dist.all_gather_object(told, (mine, problems), group=group.cpu_group)
    problems = [problem for _, theirs in told for problem in theirs]
    if any(calls != told[0][0] for calls, _ in told):
        problems.append(f"the ranks call {[calls for calls, _ in told]}")
    if problems:
        raise BrokenRuleError("; ".join(problems))
