"""The pipelines this plugin serves: diffusers class name -> our class and what the front end must know of it.

Must not import torch, diffusers or vLLM: the front end reads it before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_cfg_plugin.checkpoint import DEFAULTS_FILE, MODEL_INDEX, Checkpoint, PipelineInfo
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.params import DiffusionParams


@dataclass(frozen=True)
class PipelineFamily:
    """One supported pipeline class.

    Attributes:
        implementation: "module:Class" of ours, imported by the workers only.
        prompt_template: what the family wraps a prompt in before its tokenizer sees it.
        template_prefix_tokens: leading tokens of the template whose embeddings the model never sees.
        describe: reads a checkpoint's configuration files.
    """

    implementation: str
    prompt_template: str
    template_prefix_tokens: int
    describe: Callable[[Checkpoint, DiffusionParams], PipelineInfo]


def _describe_qwen_image(checkpoint: Checkpoint, defaults: DiffusionParams) -> PipelineInfo:
    vae = _component_config(checkpoint, "vae")
    scheduler = _component_config(checkpoint, "scheduler", "scheduler_config.json")
    # diffusers pipeline_qwenimage.py: two latent pixels each way make one token.
    vae_scale_factor = 2 ** len(vae["temperal_downsample"])
    side = 128 * vae_scale_factor
    base = DiffusionParams(height=side, width=side, num_inference_steps=50, true_cfg_scale=4.0, negative_prompt=None)
    return PipelineInfo(
        size_multiple=2 * vae_scale_factor,
        pixels_per_token=2 * vae_scale_factor,
        max_text_tokens=1024,
        # With `shift_terminal` the schedule is stretched between its first and last sigma: one step divides by zero.
        min_steps=2 if scheduler.get("shift_terminal") else 1,
        default_params=_overlay(base, defaults),
    )


FAMILIES: dict[str, PipelineFamily] = {
    "QwenImagePipeline": PipelineFamily(
        implementation="vllm_cfg_plugin.pipelines.qwen_image:QwenImagePipeline",
        prompt_template=(
            "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
            "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
        template_prefix_tokens=34,
        describe=_describe_qwen_image,
    ),
}


def family_of(checkpoint: Checkpoint) -> PipelineFamily:
    """The family of a checkpoint.

    Raises:
        ConfigurationError: not a diffusers checkpoint, or of a class that we don't know; names those we do.
    """
    class_name = checkpoint.class_name()
    known = ", ".join(sorted(FAMILIES))
    if class_name is None:
        raise ConfigurationError(
            f"model {checkpoint.model!r} is not a diffusers checkpoint: it has no {MODEL_INDEX} that names a pipeline "
            "class"
        )
    if class_name not in FAMILIES:
        raise ConfigurationError(
            f"model {checkpoint.model!r} is a {class_name}, which this plugin does not serve; it serves: {known}"
        )
    return FAMILIES[class_name]


def check_servable(checkpoint: Checkpoint) -> None:
    """Everything that can be known to be wrong with a checkpoint before a process is started.

    Raises:
        ConfigurationError: unknown class, missing or unreadable component configs, missing or truncated weight files.
    """
    describe(checkpoint)
    checkpoint.check_weights()


def describe(checkpoint: Checkpoint) -> PipelineInfo:
    """What the front end must know of a checkpoint; its `generation_config.json` overrides the family's defaults."""
    family = family_of(checkpoint)
    raw = checkpoint.read_json(DEFAULTS_FILE) or {}
    try:
        defaults = msgspec.convert(raw, DiffusionParams)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"model {checkpoint.model!r}: {DEFAULTS_FILE}: {error}") from error
    return family.describe(checkpoint, defaults)


def _component_config(checkpoint: Checkpoint, component: str, file: str = "config.json") -> dict[str, Any]:
    config = checkpoint.read_json(f"{component}/{file}")
    if config is None:
        raise ConfigurationError(f"model {checkpoint.model!r} is incomplete: {component}/{file} is missing")
    return config


def _overlay(base: DiffusionParams, over: DiffusionParams) -> DiffusionParams:
    given = {name: value for name in over.__struct_fields__ if (value := getattr(over, name)) is not msgspec.UNSET}
    return msgspec.structs.replace(base, **given)
