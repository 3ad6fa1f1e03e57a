"""Linear layers whose weights are one byte each, with a scale for each output channel; must not import vLLM.

Made from loaded weights. Not by torchao: importing it takes seconds of every start, and of all that it knows a packed
forward needs one product of rows, whose result may depend on nothing but the row.
"""

from __future__ import annotations

from functools import cache
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

# Of each method: how weights are stored, and the largest number that this holds.
METHODS: dict[str, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
_FP8_CAPABILITY = (8, 9)  # of the GPUs that multiply such numbers


class QuantizedLinear(nn.Module):
    """A linear layer with weights [outputs, channels] in one byte each.

    Rows are multiplied in their own dtype by weights that are widened for the while; on a GPU that multiplies fp8, rows
    are rounded to fp8 as well, each with a scale of its own.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)  # [outputs]
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = weight.shape

    @classmethod
    def of(cls, linear: nn.Linear, method: str, device: torch.device) -> Self:
        """Quantize a layer's weights, on the device where they are to be.

        Args:
            method: of `METHODS`.
        """
        dtype, largest = METHODS[method]
        weight = linear.weight.detach().to(device, torch.float32)
        scale = weight.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny) / largest
        scaled = weight / scale[:, None]
        rounded = scaled.round_() if dtype == torch.int8 else scaled
        bias = None if linear.bias is None else linear.bias.detach().to(device)
        return cls(rounded.clamp_(-largest, largest).to(dtype), scale.to(linear.weight.dtype), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [..., channels] to [..., outputs]."""
        if self.weight.dtype == torch.float8_e4m3fn and x.is_cuda and _multiplies_fp8(x.device):
            return self._multiply_fp8(x.flatten(0, -2)).view(*x.shape[:-1], self.out_features)
        product = F.linear(x, self.weight.to(x.dtype)).mul_(self.scale.to(x.dtype))
        return product if self.bias is None else product.add_(self.bias)

    def _multiply_fp8(self, rows: torch.Tensor) -> torch.Tensor:
        _, largest = METHODS["fp8"]
        scales = rows.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12) / largest
        narrow = (rows / scales).clamp_(-largest, largest).to(torch.float8_e4m3fn)
        of_weight = self.scale.float()[None]
        product: torch.Tensor = torch._scaled_mm(
            narrow, self.weight.t(), scales, of_weight, bias=self.bias, out_dtype=rows.dtype, use_fast_accum=True
        )
        return product


def quantize_layers(model: nn.Module, method: str, device: torch.device) -> None:
    """Quantize the linear layers inside a model's lists of layers, one after the other, straight to a device.

    What comes before and after those lists stays as it is, and where it is.
    """
    for layer in layers_of(model):
        for parent in [*layer.modules()]:
            for name, child in [*parent.named_children()]:
                if type(child) is nn.Linear:
                    setattr(parent, name, QuantizedLinear.of(child, method, device))


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that run one after the other: of its lists of modules, those that are in no other list."""
    found: list[nn.Module] = []
    for child in model.children():
        found += filter(None, child) if isinstance(child, nn.ModuleList) else layers_of(child)
    return found


@cache
def _multiplies_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
