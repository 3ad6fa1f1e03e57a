"""The table of docs/memory.md: well-known models on one and on two GPUs of some sizes.

    python -m benchmarks.memory_table

Nothing is loaded and no GPU is needed. The models are those of `known_models.py`, whose docstring says where their
numbers come from; the sizes of requests are each model's own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.common import markdown_table
from benchmarks.known_models import MODELS, write_configurations
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.memory.placement import GIB, Card, ModelMemory, fits, place
from vllm_cfg_plugin.memory.sizing import model_memory

GIGABYTES = (24, 48, 80)
RANKS = (1, 2)
QUANTIZATIONS = {"": None, ", fp8": "fp8"}
SHARE = 0.92  # vLLM's own `--gpu-memory-utilization`


def memory_of(name: str, quantization: str | None = None) -> ModelMemory:
    """What one of `MODELS` takes in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        return model_memory(Checkpoint(str(write_configurations(name, Path(folder)))), torch.bfloat16, "", quantization)


def rows(models: dict[str, ModelMemory]) -> list[tuple[str, ...]]:
    """A row for each model and number of GPUs."""
    return [
        (name, str(ranks), *(_cell(model, gigabytes, ranks) for gigabytes in GIGABYTES))
        for name, model in models.items()
        for ranks in RANKS
    ]


def _cell(model: ModelMemory, gigabytes: int, ranks: int) -> str:
    card = Card(gigabytes * GIB, SHARE)
    placement = place(model, card, ranks)
    needed = f"{placement.needed / GIB:.1f}"
    if not fits(placement, card):
        return f"no: {needed}"
    layers = f" + {placement.offloaded / GIB:.1f}" * bool(placement.offloaded)
    return f"{placement.text_encoder}{layers}: {needed}"


def table(models: dict[str, ModelMemory]) -> str:
    return markdown_table(("model", "GPUs", *(f"{size} GB" for size in GIGABYTES)), rows(models))


if __name__ == "__main__":
    print(table({f"{name}{suffix}": memory_of(name, of) for name in MODELS for suffix, of in QUANTIZATIONS.items()}))
