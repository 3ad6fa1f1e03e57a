"""Components that are loaded apart from their pipeline: streamed, quantized, offloaded; must not import vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.offload import offload_layers
from vllm_cfg_plugin.pipelines.quantized import quantize_layers
from vllm_cfg_plugin.pipelines.weight_files import component_class, component_names, component_variants


def load_streamed(
    checkpoint: Checkpoint, family: type, name: str, dtype: torch.dtype, device: torch.device, variant: str | None
) -> Any:
    """Load one model of a checkpoint so that each of its layers is on `device` while it runs.

    Args:
        variant: of the names of weight files; a folder's component without one of that name has its ordinary ones.

    Raises:
        OSError, ValueError: it can't be loaded.
    """
    model = _load(checkpoint, family, name, dtype, variant)
    stream_layers(model, device)
    return model


def load_transformer(
    checkpoint: Checkpoint,
    family: Any,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None,
    *,
    quantization: str | None = None,
    offloaded_bytes: int = 0,
) -> Any:
    """Load one model of a checkpoint that predicts noise, its layers quantized or partly in host memory, or both.

    The device never holds more than one layer that is not yet quantized.

    Args:
        variant: as above.
        quantization: of `quantized.METHODS`.
        offloaded_bytes: of layers' weights that are to stay in host memory, at least.

    Raises:
        ConfigurationError: it is quantized already, or its layers must be on the device.
        OSError, ValueError: it can't be loaded.
    """
    if quantization and "quantization_config" in checkpoint.component_config(name):
        raise ConfigurationError(
            f"quantization={quantization!r} is not valid for model {checkpoint.model!r}: {name}/ is quantized already; "
            "leave it out"
        )
    if offloaded_bytes and not family.layer_lists:
        raise ConfigurationError(
            f"cpu_offload_gb is not valid for model {checkpoint.model!r}: {family.__name__} forwards only layers that "
            "are on the device; leave it out"
        )
    model = _load(checkpoint, family, name, dtype, variant)
    if quantization:
        quantize_layers(model, quantization, device)
    if offloaded_bytes:
        offload_layers(model, device, offloaded_bytes, family.layer_lists)
        return model
    return model.to(device)


def _load(checkpoint: Checkpoint, family: type, name: str, dtype: torch.dtype, variant: str | None) -> Any:
    """The model in host memory."""
    is_folder = Path(checkpoint.model).expanduser().is_dir()
    model = component_class(*component_names(checkpoint, family)[name]).from_pretrained(
        checkpoint.model,
        subfolder=name,
        revision=checkpoint.revision,
        variant=component_variants(checkpoint, variant).get(name) if variant and is_folder else variant,
        dtype=dtype,
        use_safetensors=True,
    )
    return model.eval()


def stream_layers(model: torch.nn.Module, device: torch.device) -> None:
    """Have every layer copied to the device before it runs, the next one meanwhile, and dropped there afterwards.

    For models whose layers are called as modules, by one thread at a time: diffusers learns their order from the first
    call.
    """
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model, onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda", record_stream=False
    )
