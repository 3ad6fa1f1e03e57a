"""What every packed transformer must do with adapters: like merged weights, and nothing to neighbours."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_cfg_plugin.pipelines.adapters import (
    Adapter,
    Carried,
    LowRank,
    adaptable_layers,
    carrying,
    makes_modulations,
    name_layer,
)

RANK = 8
# (model, sequences) -> prediction of each.
Forward = Callable[[Any, Sequence[Any]], Sequence[torch.Tensor]]


def assert_like_merged(
    reference: Any,
    packed: Any,
    sequences: Sequence[Any],
    forward: Forward,
    forward_one: Callable[[Any, Any], torch.Tensor],
    modulating: bool,
) -> None:
    """Each sequence's own, one or several at once, on every layer that can be adapted, in one forward.

    Args:
        reference: diffusers' model of the same weights; `forward_one` is its prediction of a sequence.
    """
    carried = draw_carried(packed, modulating)
    with carrying(carried):
        predictions = forward(packed, sequences)
    for sequence, own, prediction in zip(sequences, carried, predictions, strict=True):
        expected = forward_one(merged(reference, packed, own), sequence)
        assert not own or (expected - forward_one(reference, sequence)).abs().max() > 0.01
        torch.testing.assert_close(prediction, expected, rtol=0, atol=2e-5)


def assert_independent(packed: Any, sequences: Sequence[Any], forward: Forward, modulating: bool) -> None:
    """With or without adapters of its own a sequence has the same bits alone, in any order and beside any."""
    carried = draw_carried(packed, modulating)
    alone: list[torch.Tensor] = []
    for sequence, own in zip(sequences, carried, strict=True):
        with carrying([own]):
            alone += forward(packed, [sequence])
    choose = random.Random(13)
    for _ in range(12):
        members = choose.sample(range(len(sequences)), choose.choice([2, 3, 4, 6]))
        with carrying([carried[i] for i in members]):
            together = forward(packed, [sequences[i] for i in members])
        assert all(torch.equal(together[k], alone[i]) for k, i in enumerate(members)), members


def draw_carried(packed: Any, modulating: bool) -> list[Carried]:
    """Of six sequences: nothing, one adapter, another, two at once, nothing, the first again."""
    first, second, third = (draw_adapter(packed, seed, modulating) for seed in (1, 2, 3))
    return [(), ((first, 0.8),), ((second, -1.5),), ((third, 0.5), (first, 1.0)), (), ((first, 0.8),)]


def draw_adapter(model: Any, seed: int, modulating: bool) -> Adapter:
    """A random adapter of every second layer that can be adapted; which ones, depends on the seed."""
    torch.manual_seed(seed)
    layers = adaptable_layers(model)
    assert any(makes_modulations(model, name) for name in layers)
    chosen = [name for name in [*layers][seed % 2 :: 2] if modulating or not makes_modulations(model, name)]
    low_ranks = {}
    for name in chosen:
        layer = layers[name]
        down = torch.randn(RANK, layer.in_features) / layer.in_features**0.5
        name_layer(layer, name)
        low_ranks[name] = LowRank(down, torch.randn(layer.out_features, RANK) * 0.03)
    return Adapter(f"adapter-{seed}", low_ranks, any(makes_modulations(model, name) for name in chosen))


def merged(reference: Any, packed: Any, carried: Carried) -> Any:
    """diffusers' model with weights to which the adapters of our model over the same weights are added."""
    model = copy.deepcopy(reference)
    for name in adaptable_layers(packed):
        for adapter, scale in carried:
            if name in adapter.layers:
                down, up = adapter.layers[name]
                model.get_submodule(name).weight.data += scale * up @ down
    return model
