"""Linear layers of diffusers' models on packed rows; must not import vLLM.

On a CPU in float32 the kernel is the one that `cpu_kernels.py` names. Each of them gives a row the same bits for every
number of rows from 16 up.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import nn

from vllm_cfg_plugin.pipelines.common.cpu_kernels import cpu_kernels

# Twice GELU's tanh argument, sqrt(2 / pi) * (x + 0.044715 * x**3).
_GELU_LINEAR = 2 * sqrt(2 / pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR


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
    if cpu_kernels().linear and _is_plain(module, x):
        return onednn_linear(x, module.weight, module.bias)
    return module(x)


def feed_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """`module(x)` for diffusers' FeedForward and rows x, [rows, channels]; its dropout does nothing in inference."""
    first, _, last = module.net
    if not (type(first) is GELU and first.approximate == "tanh" and _is_plain(first.proj, x)):
        return module(x)
    return linear(last, gelu_linear(first.proj, x))


def gelu_linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of GELU of `module(x)` for a linear layer and rows x, [rows, channels]."""
    if cpu_kernels().linear and _is_plain(module, x):
        return onednn_linear(x, module.weight, module.bias, "gelu", "tanh")
    return _gelu(module(x))


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of GELU.

    (1 + tanh(z)) / 2 is sigmoid(2z): of the same precision, and on a CPU all these operations together take half the
    time of torch's one, whose tanh is slow.
    """
    if not (x.is_cpu and x.dtype == torch.float32):
        return F.gelu(x, approximate="tanh")
    z = (x * x).mul_(_GELU_CUBIC).add_(_GELU_LINEAR).mul_(x)
    return z.sigmoid_().mul_(x)


def _is_plain(module: Any, x: torch.Tensor) -> bool:
    """Whether a CPU kernel can stand in for the layer: an adapter or a hook on it must be called."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter  # a quantized weight is a tensor of another kind
        and x.dtype == torch.float32
        and x.is_cpu
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
    )
