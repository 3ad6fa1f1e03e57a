"""Linear layers of diffusers' models on a CPU in float32 by oneDNN; must not import vLLM.

torch gives such products to MKL, which on an AVX-512 core of AMD reaches 105 GFLOP/s where oneDNN reaches 240 (torch
2.13). oneDNN too gives a row the same bits in any company: measured for every number of rows from 2 up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import nn


def has_onednn() -> bool:
    """Whether this torch has oneDNN, and nobody switched it off."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def onednn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none", variant: str = ""
) -> torch.Tensor:
    """Rows x [rows, channels] by weight [outputs, channels], which is contiguous or the transpose of what is.

    Args:
        activation, variant: an elementwise function of the outputs, as torch's operator for oneDNN names them.
    """
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], variant)
    return output


def linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """`module(x)` for a linear layer and rows x, [rows, channels]."""
    return onednn_linear(x, module.weight, module.bias) if _is_for_onednn(module, x) else module(x)


def feed_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """`module(x)` for diffusers' FeedForward and rows x, [rows, channels]; its dropout does nothing in inference."""
    first, _, last = module.net
    if not (type(first) is GELU and first.approximate == "tanh" and _is_for_onednn(first.proj, x)):
        return module(x)
    return linear(last, gelu_linear(first.proj, x))


def gelu_linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of GELU of `module(x)` for a linear layer and rows x, [rows, channels]."""
    if _is_for_onednn(module, x):
        return onednn_linear(x, module.weight, module.bias, "gelu", "tanh")
    return F.gelu(module(x), approximate="tanh")


def _is_for_onednn(module: Any, x: torch.Tensor) -> bool:
    """Whether oneDNN can stand in for the layer: an adapter or a hook on it must be called."""
    return (
        type(module) is nn.Linear
        and x.dtype == torch.float32
        and x.is_cpu
        and has_onednn()
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
    )
