"""Linear layers of diffusers' models on packed rows; must not import vLLM.

On a CPU in float32 the kernel is the one that `cpu_kernels.py` names. Each of them gives a row the same bits for every
number of rows from 16 up. What sequences carry of adapters is added here, see `low_rank.py`.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import nn

from vllm_cfg_plugin.pipelines.common.cpu_kernels import cpu_kernels
from vllm_cfg_plugin.pipelines.common.low_rank import AdaptedSpans, adapted_spans
from vllm_cfg_plugin.pipelines.common.packing import PackedRows

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


def linear(module: Any, x: torch.Tensor, rows: PackedRows | None = None) -> torch.Tensor:
    """`module(x)` for a linear layer and rows x, [rows, channels], and what their sequences' adapters add.

    Args:
        rows: the stream whose window x is; None where all rows belong to one sequence, or to sequences that carry the
            same adapters.
    """
    output = _product(module, x)
    if adapted := adapted_spans(module, x, rows):
        adapted.add(x, output)
    return output


def feed_forward(module: Any, x: torch.Tensor, rows: PackedRows | None = None) -> torch.Tensor:
    """`module(x)` for diffusers' FeedForward; its dropout does nothing in inference. Arguments as of `linear`.

    Raises:
        ValueError: its activation is none that adapters of its first layer could come before.
    """
    first, _, last = module.net
    if type(first) is GELU and first.approximate == "tanh":
        return linear(last, gelu_linear(first.proj, x, rows), rows)
    if any(adapted_spans(layer, x, rows) for layer in (first.proj, last)):
        raise ValueError(f"adapters of a {type(first).__name__} are not supported")
    return module(x)


def gelu_linear(module: Any, x: torch.Tensor, rows: PackedRows | None = None) -> torch.Tensor:
    """The tanh approximation of GELU of `module(x)` for a linear layer; arguments as of `linear`."""
    adapted = adapted_spans(module, x, rows)
    return _gelu_adapted(module, x, adapted) if adapted else _gelu_of_product(module, x)


def _product(module: Any, x: torch.Tensor) -> torch.Tensor:
    if cpu_kernels().linear and _is_plain(module, x):
        return onednn_linear(x, module.weight, module.bias)
    return module(x)


def _gelu_of_product(module: Any, x: torch.Tensor) -> torch.Tensor:
    if cpu_kernels().linear and _is_plain(module, x):
        return onednn_linear(x, module.weight, module.bias, "gelu", "tanh")
    return _gelu(module(x))


def _gelu_adapted(module: Any, x: torch.Tensor, adapted: AdaptedSpans) -> torch.Tensor:
    """GELU comes after what adapters add. Other rows must have the bits that they have without such neighbours."""
    pieces = []
    for part, own in adapted.parts(x):
        window = x[part.window]
        if own is None:
            activated = _gelu_of_product(module, window)
        else:
            product = _product(module, window)
            own.add(window, product)
            activated = _gelu(product)
        pieces.append(activated[part.inner])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


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
