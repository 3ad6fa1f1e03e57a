"""Adapter files of random numbers, and diffusers' own pipelines with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_cfg_plugin.pipelines.adapters import adaptable_layers

RANK = 4


def make_adapter(
    path: Path,
    transformer: Any,
    seed: int = 0,
    *,
    rank: int = RANK,
    layers: str | Sequence[str] = "",
    size: float = 0.05,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Save an adapter in diffusers' layout, of layers of a packed transformer with one of `layers` in their name."""
    torch.manual_seed(seed)
    tensors = {}
    for name, layer in adaptable_layers(transformer).items():
        if any(part in name for part in ([layers] if isinstance(layers, str) else layers)):
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features) / layer.in_features**0.5
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank) * size
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None)
    return path


def adapt_reference(pipeline: Any, adapters: Sequence[tuple[Path, float]]) -> None:
    """Have diffusers' pipeline use adapter files at these scales.

    By its own loader, where peft is installed and the pipeline has one; else they are added to its weights.
    """
    if find_spec("peft") is None or not hasattr(pipeline, "load_lora_weights"):
        for path, scale in adapters:
            _merge(pipeline.transformer, path, scale)
        return
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, (path, _) in zip(names, adapters, strict=True):
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    pipeline.set_adapters(names, [scale for _, scale in adapters])


def _merge(transformer: Any, path: Path, scale: float) -> None:
    tensors = load_file(path)
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer = transformer.get_submodule(name.removeprefix("transformer.").removesuffix(".lora_A.weight"))
            layer.weight.data += scale * tensors[name.replace("lora_A", "lora_B")] @ down
