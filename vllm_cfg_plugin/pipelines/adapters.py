"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) that sequences of one packed forward carry, each its own.

An adapter adds `scale * (x @ down.T) @ up.T` to what a linear layer makes of the rows x of its sequences; the layer's
weights stay as they are, so neighbours with other adapters, or none, share its product.

Must import neither vLLM nor diffusers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from vllm_cfg_plugin.pipelines.quantized import QuantizedLinear


class LowRank(NamedTuple):
    """What an adapter does to one layer: down [rank, channels], up [outputs, rank] with the adapter's alpha in it."""

    down: torch.Tensor
    up: torch.Tensor

    def to(self, device: torch.device) -> Self:
        return type(self)(self.down.to(device), self.up.to(device))


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter of one loaded model.

    Attributes:
        key: names the content: equal keys, equal weights.
        layers: what it does to each layer, by the name that `name_layer` has given it.
        modulates: some of them make modulations, which then are no matter of the timestep alone.
    """

    key: str
    layers: Mapping[str, LowRank]
    modulates: bool = False

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for low_rank in self.layers.values() for tensor in low_rank]

    def to(self, device: torch.device) -> Adapter:
        return Adapter(self.key, {name: own.to(device) for name, own in self.layers.items()}, self.modulates)


def name_layer(layer: nn.Module, name: str) -> None:
    """Name a layer for adapters: the stand-in that works for it while its weights are elsewhere has the name too."""
    layer.adapted_as = name  # type: ignore[assignment]


def adaptable_layers(model: Any) -> dict[str, nn.Module]:
    """The linear layers of a packed transformer that adapters may adapt, by name."""
    closed = tuple(f"{name}." for name in model.closed_parts)
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, QuantizedLinear)) and not name.startswith(closed)
    }


def makes_modulations(model: Any, name: str) -> bool:
    """Whether a layer of a packed transformer makes modulations."""
    return name.endswith(model.modulation_layers)


# What one sequence carries: adapters and the scale of each, in the order in which they are added.
Carried = tuple[tuple[Adapter, float], ...]


@dataclass(frozen=True, eq=False)
class Pack:
    """What each sequence of a packed forward carries; some of them do carry adapters."""

    carried: tuple[Carried, ...]

    @cached_property
    def modulates(self) -> bool:
        return any(map(_modulates, self.carried))

    def at(self, module: nn.Module) -> list[list[tuple[LowRank, float]]]:
        """Of each sequence what it adds to a layer's product."""
        name = vars(module).get("adapted_as", "")
        return [
            [(adapter.layers[name], scale) for adapter, scale in own if name in adapter.layers] for own in self.carried
        ]

    def by_modulation(self, count: int) -> list[tuple[Carried, list[int]]]:
        """The numbers of `count` conditions, those of all sequences once or several times over, by what modulates them.

        Returns:
            What their sequences carry, () where that modulates nothing, and the numbers.
        """
        groups: dict[Hashable, tuple[Carried, list[int]]] = {}
        for number in range(count):
            own = self.carried[number % len(self.carried)]
            carried = own if _modulates(own) else ()
            groups.setdefault(_name(carried), (carried, []))[1].append(number)
        return [*groups.values()]


_of_context: ContextVar[Pack | None] = ContextVar("adapters", default=None)


def current_pack() -> Pack | None:
    """What the sequences of this thread's forward carry; None where none carries anything."""
    return _of_context.get()


def name_of_modulating() -> Hashable:
    """Names the adapters that modulate what this thread computes; () for none."""
    pack = current_pack()
    return _name(pack.carried[0]) if pack is not None and pack.modulates else ()


@contextmanager
def carrying(carried: Sequence[Carried]) -> Iterator[None]:
    """Within it this thread forwards so many sequences, which carry these adapters."""
    token = _of_context.set(Pack(tuple(carried)) if any(carried) else None)
    try:
        yield
    finally:
        _of_context.reset(token)


def _modulates(carried: Carried) -> bool:
    return any(adapter.modulates for adapter, _ in carried)


def _name(carried: Carried) -> Hashable:
    return tuple((adapter.key, scale) for adapter, scale in carried)
