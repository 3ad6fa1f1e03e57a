"""Layers whose weights are in host memory: they come to the device in turn, the next one's while one is at work.

Not by diffusers' hooks, which take whole layers, called as modules by one thread at a time: a packed forward calls the
parts of layers, and two threads may forward at once. So each forward has room of its own for the weights of two layers
and works with stand-ins of the layers, whose weights are there. The bits are those of weights that stay on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from vllm_cfg_plugin.pipelines.quantized import QuantizedLinear

Part = Literal["body", "modulation"]

_ALIGNMENT = 256  # bytes
_SLOTS = 2  # for layers on the device: one at work, one on its way


class HostWeights:
    """The weights of some linear layers end to end in host memory; the layers keep them, as views of it.

    Args:
        linears: {name: layer}.
        device: where the weights are to come.
    """

    def __init__(self, linears: dict[str, Any], device: torch.device) -> None:
        self.device = device
        sizes = [-(-layer.weight.nbytes // _ALIGNMENT) * _ALIGNMENT for layer in linears.values()]
        self.data = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._sizes = dict(zip(linears, sizes, strict=True))
        self._like: dict[str, tuple[torch.dtype, torch.Size]] = {}
        for (name, layer), place in zip(linears.items(), self.data.split(sizes), strict=True):
            self._like[name] = layer.weight.dtype, layer.weight.shape
            weight = self._view(name, place).copy_(layer.weight)
            is_parameter = isinstance(layer.weight, nn.Parameter)
            layer.weight = nn.Parameter(weight, requires_grad=False) if is_parameter else weight

    @property
    def names(self) -> Sequence[str]:
        """Of its layers."""
        return [*self._sizes]

    def weights_in(self, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights by the names of their layers, where `slot` has got a copy of `data`."""
        places = slot[: self.data.numel()].split([*self._sizes.values()])
        return {name: self._view(name, place) for name, place in zip(self._sizes, places, strict=True)}

    def _view(self, name: str, place: torch.Tensor) -> torch.Tensor:
        dtype, shape = self._like[name]
        return place[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


def offload_layers(
    model: nn.Module, device: torch.device, nbytes: int, layer_lists: Mapping[str, Sequence[str]]
) -> int:
    """Bring a model to a device, but for the weights of some layers, spread evenly over all: these go to host memory.

    Args:
        nbytes: at least so many of them, as far as the layers have so many.
        layer_lists: see `EnginePipeline`.

    Returns:
        Bytes that stay in host memory.
    """
    layers = offloadable(model, layer_lists)
    wanted = -(-nbytes * len(layers) // max(1, sum(weight_bytes(layer) for layer, _ in layers)))
    kept = 0
    for number, (layer, modulators) in enumerate(layers):
        if (number + 1) * wanted // len(layers) > number * wanted // len(layers):
            host = _keep_in_host(layer, device, modulators)
            layer.in_host = host  # type: ignore[assignment]
            kept += sum(weights.data.nbytes for weights in host.values())
        _move(layer, device)
    _move(model, device)
    return kept


def offloadable(model: Any, layer_lists: Mapping[str, Sequence[str]]) -> list[tuple[nn.Module, Sequence[str]]]:
    """The layers of a model's lists, with the names of their children that give modulations."""
    return [(layer, modulators) for name, modulators in layer_lists.items() for layer in getattr(model, name, ())]


def weight_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's weights that may be in host memory."""
    return sum(linear.weight.nbytes for linear in _linears_of(layer).values())


def in_turn(layers: Any, part: Part = "body") -> Iterator[Any]:
    """Layers with this part of their weights on the device, each until the next one is asked for."""
    hosts = [getattr(layer, "in_host", {}).get(part) for layer in layers]
    transfers = _Transfers([host for host in hosts if host is not None])
    try:
        for layer, host in zip(layers, hosts, strict=True):
            if host is None:
                yield layer
            else:
                yield _stand_in(layer, transfers.next())
                transfers.use_slot_again()
    finally:
        transfers.close()


class _Transfers:
    """Copies weights to the device in turn, on a stream beside that of the forward."""

    def __init__(self, hosts: Sequence[HostWeights]) -> None:
        self._left = deque(hosts)
        self._arriving: deque[tuple[HostWeights, torch.Tensor, torch.cuda.Event | None]] = deque()
        self._forward: torch.cuda.Stream | None = None
        if not hosts:
            return
        device = hosts[0].device
        if device.type == "cuda":
            self._forward = torch.cuda.current_stream(device)
        most = max(host.data.numel() for host in hosts)
        for _ in range(min(_SLOTS, len(hosts))):
            self._send_next(torch.empty(most, dtype=torch.uint8, device=device))

    def next(self) -> dict[str, torch.Tensor]:
        """The next weights, for what is queued from now on."""
        host, self._slot, arrived = self._arriving.popleft()
        if self._forward is not None and arrived is not None:
            self._forward.wait_event(arrived)
        return host.weights_in(self._slot)

    def use_slot_again(self) -> None:
        """Fill the slot of the last weights anew: all that reads them is queued."""
        if self._left:
            self._send_next(self._slot)

    def close(self) -> None:
        """The slots may be freed: what the forward's stream does later comes after all copies."""
        for *_, arrived in self._arriving:
            if self._forward is not None and arrived is not None:
                self._forward.wait_event(arrived)

    def _send_next(self, slot: torch.Tensor) -> None:
        host, arrived = self._left.popleft(), None
        target = slot[: host.data.numel()]
        if self._forward is None:
            target.copy_(host.data)
        else:
            copies = _copy_stream(self._forward)
            copies.wait_stream(self._forward)
            with torch.cuda.stream(copies):
                target.copy_(host.data, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(copies)
        self._arriving.append((host, slot, arrived))


@lru_cache
def _copy_stream(forward: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for each stream of forwards: on a common one the copies of one would wait for layers of the other."""
    return torch.cuda.Stream(forward.device, priority=forward.priority)


def _stand_in(module: nn.Module, weights: dict[str, torch.Tensor], name: str = "") -> nn.Module:
    """A copy of a module that shares all with it but the weights of the linear layers of these names."""
    own = copy(module)
    fields = vars(own)
    inner = name and f"{name}."
    fields["_modules"] = {
        of_child: child and _stand_in(child, weights, inner + of_child) for of_child, child in module._modules.items()
    }
    if (weight := weights.get(name)) is not None:
        if "weight" in module._parameters:
            fields["_parameters"] = module._parameters | {"weight": nn.Parameter(weight, requires_grad=False)}
        else:
            fields["_buffers"] = module._buffers | {"weight": weight}
    return own


def _keep_in_host(layer: nn.Module, device: torch.device, modulators: Sequence[str]) -> dict[Part, HostWeights]:
    parts: dict[Part, dict[str, Any]] = {"body": {}, "modulation": {}}
    for name, linear in _linears_of(layer).items():
        parts["modulation" if name.split(".")[0] in modulators else "body"][name] = linear
    return {part: HostWeights(linears, device) for part, linears in parts.items() if linears}


def _linears_of(layer: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear | QuantizedLinear)}


def _move(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device, but for weights that are kept in host memory."""
    in_host = {
        id(module.get_submodule(name))
        for module in model.modules()
        for host in getattr(module, "in_host", {}).values()
        for name in host.names
    }
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None and not (name == "weight" and id(module) in in_host):
                    moved = tensor.to(device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
