"""The pipelines this plugin serves: diffusers class name -> our class, and what that says of a checkpoint.

A new pipeline is one file and one line here. Must not import torch, diffusers or vLLM by itself: describing a
checkpoint imports its family's module, and nothing else does.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec

from vllm_cfg_plugin.checkpoint import DEFAULTS_FILE, MODEL_INDEX, Checkpoint, PipelineInfo
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.params import DiffusionParams

if TYPE_CHECKING:
    from vllm_cfg_plugin.pipelines.base import EnginePipeline

_PIPELINES = "vllm_cfg_plugin.pipelines"

FAMILIES: dict[str, str] = {
    "FluxPipeline": f"{_PIPELINES}.flux:FluxPipeline",
    "LongCatImageEditPipeline": f"{_PIPELINES}.longcat_image:LongCatImageEditPipeline",
    "LongCatImagePipeline": f"{_PIPELINES}.longcat_image:LongCatImagePipeline",
    "QwenImagePipeline": f"{_PIPELINES}.qwen_image:QwenImagePipeline",
    "StableDiffusion3Pipeline": f"{_PIPELINES}.sd3:StableDiffusion3Pipeline",
    "ZImagePipeline": f"{_PIPELINES}.z_image:ZImagePipeline",
    "WanPipeline": f"{_PIPELINES}.wan:WanPipeline",
    "WanImageToVideoPipeline": f"{_PIPELINES}.wan:WanImageToVideoPipeline",
    "QwenImageEditPipeline": f"{_PIPELINES}.qwen_image:QwenImageEditPipeline",
    "QwenImageEditPlusPipeline": f"{_PIPELINES}.qwen_image:QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline": f"{_PIPELINES}.qwen_image:QwenImageLayeredPipeline",
}


def implementation_of(checkpoint: Checkpoint) -> str:
    """ "module:Class" of the pipeline that serves a checkpoint.

    Raises:
        ConfigurationError: not a diffusers checkpoint, or of a class that we don't know; names those we do.
    """
    class_name = checkpoint.class_name()
    if class_name is None:
        raise ConfigurationError(
            f"model {checkpoint.model!r} is not a diffusers checkpoint: it has no {MODEL_INDEX} that names a pipeline "
            "class"
        )
    if class_name not in FAMILIES:
        raise ConfigurationError(
            f"model {checkpoint.model!r} is a {class_name}, which this plugin does not serve; it serves: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[class_name]


def pipeline_class(checkpoint: Checkpoint) -> type[EnginePipeline]:
    """Our class for a checkpoint; importing it also imports diffusers and transformers."""
    module, _, name = implementation_of(checkpoint).partition(":")
    cls: type[EnginePipeline] = getattr(import_module(module), name)
    return cls


def check_servable(checkpoint: Checkpoint) -> None:
    """Everything that can be known to be wrong with a checkpoint before a process is started.

    Raises:
        ConfigurationError: unknown class, missing components, missing or unreadable component configs, missing or
            truncated weight files.
    """
    implementation_of(checkpoint)
    checkpoint.check_components()
    describe(checkpoint)
    checkpoint.check_weights()


def describe(checkpoint: Checkpoint) -> PipelineInfo:
    """What a checkpoint can do; its `generation_config.json` overrides the family's defaults.

    Raises:
        ConfigurationError: see `implementation_of`; missing or unreadable configurations.
    """
    family = pipeline_class(checkpoint)
    try:
        info = family.describe(checkpoint)
    except ConfigurationError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"model {checkpoint.model!r}: its configuration files have a value that a {family.__name__} can't have: "
            f"{type(error).__name__}: {error}"
        ) from error
    raw = checkpoint.read_json(DEFAULTS_FILE) or {}
    try:
        defaults = msgspec.convert(raw, DiffusionParams)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"model {checkpoint.model!r}: {DEFAULTS_FILE}: {error}") from error
    given = {
        name: value for name in defaults.__struct_fields__ if (value := getattr(defaults, name)) is not msgspec.UNSET
    }
    return dataclasses.replace(info, default_params=msgspec.structs.replace(info.default_params, **given))
