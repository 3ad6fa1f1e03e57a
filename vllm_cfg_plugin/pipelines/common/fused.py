"""A block's elementwise work, each piece one kernel on a GPU whatever the number of sequences; must import only torch.

torch compiles them, once for all layers and all numbers of rows and sequences. They compute in float32 and round once,
as torch's own fused kernels do. Not on a CPU: there the bits are part of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

_enabled = False


def enable() -> None:
    """From now on packed forwards on GPUs use these functions; to be called before the first."""
    global _enabled
    _enabled = True


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


@cache
def compiled(function: Callable[..., Any]) -> Any:
    """One of these functions as one kernel; torch runs it as it is where it would have to compile it too often."""
    return torch.compile(function, dynamic=True)
