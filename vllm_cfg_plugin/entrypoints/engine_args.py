"""Arguments of vLLM's `EngineArgs` for offline use; must not import torch, and vLLM only when called."""

from __future__ import annotations

import os
from dataclasses import MISSING
from typing import Any

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.config import (
    PLUGIN_NAME,
    EngineSettings,
    check_settings,
    new_address,
    unknown_name,
    with_our_defaults,
)
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.adapter_files import check_adapters
from vllm_cfg_plugin.pipelines.registry import check_servable
from vllm_cfg_plugin.vllm_options import check_options


def diffusion_engine_args(model: str, cfg_parallel_size: int, **engine_args: Any) -> dict[str, Any]:
    """Keyword arguments of vLLM's `EngineArgs` for offline use; what the caller gives wins over our defaults.

    Args:
        engine_args: fields of `EngineSettings`, or anything that `EngineArgs` takes.

    Raises:
        ConfigurationError: a model that we don't serve, a name that there is not, a setting out of range, an option
            without a use, or a VLLM_PLUGINS without us.
    """
    _check_plugin_is_allowed()
    from vllm.platforms import current_platform

    check_settings(engine_args.get("additional_config", {}))
    settings = {name: engine_args.pop(name) for name in EngineSettings.__struct_fields__ if name in engine_args}
    additional = {
        **engine_args.pop("additional_config", {}),
        **settings,
        "cfg_parallel_size": cfg_parallel_size,
        "progress_address": new_address("progress"),
        "cause_address": new_address("cause"),
    }
    asked = EngineSettings.from_dict(additional)
    checkpoint = Checkpoint(model, engine_args.get("revision"))
    check_servable(checkpoint, asked.variant, asked.sequence_parallel_size, asked.tensor_parallel_size)
    if asked.enable_lora:
        check_adapters(checkpoint, asked.lora_modules)
    _check_names(engine_args)
    check_options(engine_args, _vllms_default)
    options = with_our_defaults(engine_args, current_platform.is_cpu())
    return {**options, "model": model, "additional_config": additional}


def _check_names(engine_args: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = [*EngineSettings.__struct_fields__, *EngineArgs.__dataclass_fields__]
    if unknown := set(engine_args) - set(known):
        raise ConfigurationError(f"DiffusionLLM: {unknown_name(min(unknown), known)}")


def _vllms_default(name: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    field = EngineArgs.__dataclass_fields__[name]
    return field.default if field.default_factory is MISSING else field.default_factory()


def _check_plugin_is_allowed() -> None:
    """Without our platform vLLM fails with "Failed to infer device type", which names neither cause nor remedy."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise ConfigurationError(f"VLLM_PLUGINS={allowed!r} leaves us out: add {PLUGIN_NAME} to it, or unset it")
