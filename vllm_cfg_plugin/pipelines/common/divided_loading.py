"""Loads this rank's part of a model: of each weight that is divided no more is read; must not import vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.distributed.sequence_group import Peers
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.common.tensor_parallel import TensorPlan, finish, own_part, shares_of
from vllm_cfg_plugin.pipelines.weight_files import component_class, component_names, weight_files


def load_divided(
    checkpoint: Checkpoint,
    family: type,
    name: str,
    plan: TensorPlan,
    peers: Peers,
    *,
    dtype: torch.dtype,
    variant: str = "",
) -> Any:
    """One transformer of a checkpoint's folder with this rank's part of its weights, in host memory.

    Args:
        peers: those that have the other parts.
        dtype: of the weights, but for those that diffusers keeps in float32.
        variant: of the names of weight files.

    Raises:
        ConfigurationError: a weight is missing, or the layers are such that can't be divided.
    """
    cls = component_class(*component_names(checkpoint, family)[name])
    config = checkpoint.component_config(name)
    if "quantization_config" in config:
        raise ConfigurationError(
            f"tensor_parallel_size={peers.size} is not valid for model {checkpoint.model!r}: {name}/ is quantized; "
            "leave it out"
        )
    with init_empty_weights(), _default_dtype(dtype):
        model = cls.from_config(config)
    model.eval().requires_grad_(False)
    shares, missing = shares_of(model, plan), set(model.state_dict())
    for path in weight_files(checkpoint, family, variant)[name]:
        for key, tensor in _read(path, missing, shares, peers):
            if tensor.is_floating_point():
                tensor = tensor.to(_dtype_of(cls, key, dtype))
            _put(model, key, tensor.contiguous())  # where inputs are divided, it is a view of the file's whole rows
            missing.remove(key)
    if missing:
        raise ConfigurationError(f"model {checkpoint.model!r} is incomplete: {name}/ has no {min(missing)}")
    finish(model, plan, peers)
    return model


def _read(path: Path, wanted: set[str], shares: dict[str, Any], peers: Peers) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for key in [key for key in file.keys() if key in wanted]:  # noqa: SIM118
            yield key, own_part(file.get_slice(key), shares.get(key.rpartition(".")[0]), peers)


def _put(model: nn.Module, key: str, tensor: torch.Tensor) -> None:
    module_name, _, leaf = key.rpartition(".")
    module = model.get_submodule(module_name)
    setattr(module, leaf, tensor if leaf in module._buffers else nn.Parameter(tensor, requires_grad=False))


def _dtype_of(cls: Any, key: str, dtype: torch.dtype) -> torch.dtype:
    """As diffusers' `load_model_dict_into_meta` chooses it."""
    kept = cls._keep_in_fp32_modules or ()
    return torch.float32 if any(name in key.split(".") for name in kept) else dtype


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In which a model makes what it computes of its configuration."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
