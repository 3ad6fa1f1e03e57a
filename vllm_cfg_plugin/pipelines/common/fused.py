"""A block's elementwise work, each piece one kernel on a GPU whatever the number of sequences; must import only torch.

torch compiles them, once for all layers and all numbers of rows and sequences. Not whole blocks: that would spare some
percent of a step more, see `block_traffic` in benchmarks/README.md. They compute in float32 and round once,
as torch's own fused kernels do. Not on a CPU: there the bits are part of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

_enabled = False


def enable(is_on: bool = True) -> None:
    """From now on packed forwards on GPUs use these functions, or no longer do."""
    global _enabled
    _enabled = is_on


def is_enabled(device: torch.device) -> bool:
    """Whether forwards on a device use these functions."""
    return _enabled and device.type == "cuda"


def modulate_rows(
    stream: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor, row_spans: torch.Tensor, eps: float
) -> torch.Tensor:
    """The layer norm of each row by its span's own scale and shift.

    Args:
        stream: [rows, dim].
        scales, shifts: [spans, dim].
        row_spans: number of each row's span, [rows].
    """
    normed = F.layer_norm(stream.float(), stream.shape[1:], eps=eps)
    return (normed * scales[row_spans] + shifts[row_spans]).to(stream.dtype)


def scale_rows(stream: torch.Tensor, scales: torch.Tensor, row_spans: torch.Tensor, eps: float) -> torch.Tensor:
    """The RMS norm of each row by its span's own scale; arguments as of `modulate_rows`."""
    wide = stream.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * scales[row_spans]).to(stream.dtype)


def add_gated_rows(stream: torch.Tensor, change: torch.Tensor, gates: torch.Tensor, row_spans: torch.Tensor) -> None:
    """Add a change to the stream in place, weighed by each row's span's own gate; arguments as of `modulate_rows`."""
    stream.copy_(stream.float() + change.float() * gates[row_spans])


def norm_and_rotate_rows(x: torch.Tensor, weight: torch.Tensor, turns: torch.Tensor, eps: float) -> torch.Tensor:
    """The RMS norm of queries or keys, then their rotary position embedding: [rows, heads, head_dim].

    Args:
        x: [rows, heads, head_dim], each head normed by itself, or [rows, heads * head_dim], normed as one.
        weight: of the norm, for all rows or for each.
        turns: cosine and sine for each pair of neighbours, [rows, 1, head_dim / 2, 2].
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight
    first, second = normed.reshape(x.shape[0], -1, turns.shape[2], 2).unbind(-1)
    cosine, sine = turns.unbind(-1)
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def norm_and_rotate_joint(
    x: torch.Tensor,
    text_weight: torch.Tensor,
    image_weight: torch.Tensor,
    is_image: torch.Tensor,
    turns: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The same of a stream of texts and images, [rows, heads, head_dim]; `is_image`: of each row, [rows]."""
    weight = torch.where(is_image[:, None], image_weight, text_weight)[:, None]
    return norm_and_rotate_rows(x, weight, turns, eps)


@cache
def compiled(function: Callable[..., Any]) -> Any:
    """One of these functions as one kernel; torch runs it as it is where it would have to compile it too often."""
    return torch.compile(function, dynamic=True)
