"""What a pipeline class of diffusers says of itself, as the front end must know it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET

from vllm_cfg_plugin.checkpoint import MODEL_INDEX, Checkpoint, ImageSize, PipelineInfo, TextRules
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.params import CACHE_NUMBERS, DiffusionParams
from vllm_cfg_plugin.pipelines.any_pipeline.call_parameters import (
    IMAGES,
    MOST_IMAGES,
    NEED_IMAGES,
    OPTIONAL_IMAGES,
    SEVERAL_IMAGES,
    default_of,
    extra_fields,
    image_parameters,
    parameters_of,
)
from vllm_cfg_plugin.pipelines.any_pipeline.outline import (
    DEFAULT_SIDE,
    default_sides,
    denoiser_config,
    frames_per_latent,
    outline_of,
    patch_size,
    pixels_per_latent,
    size_multiple,
)

# Fields that only the engine's own steps read.
_OF_OUR_STEPS = frozenset({"guidance_interval", "cache", *CACHE_NUMBERS})
_MOST_TOKENS = 2**16
_DEFAULT_FPS = 24


def describe_class(diffusers_class: Any, checkpoint: Checkpoint) -> PipelineInfo:
    """What a checkpoint of a class can do.

    Raises:
        ConfigurationError: its `__call__` is not one of those that can be served.
    """
    parameters = parameters_of(diffusers_class)
    if problem := _why_not_servable(diffusers_class, checkpoint):
        raise ConfigurationError(
            f"model {checkpoint.model!r} is a {diffusers_class.__name__}, which can't be served: {problem}"
        )
    outline = outline_of(diffusers_class, checkpoint)
    spatial = pixels_per_latent(outline)
    per_token = spatial * patch_size(outline)
    multiple = size_multiple(outline, per_token)
    images = image_parameters(diffusers_class)
    needs_images = bool(NEED_IMAGES.search(diffusers_class.__name__)) or any(
        parameters[name].default is inspect.Parameter.empty for name in images
    )
    cfg_scale = "true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"
    has_size = "height" in parameters and "width" in parameters
    fields = [name for name in DiffusionParams.__struct_fields__ if name in parameters]
    is_video = "num_frames" in parameters or "video_length" in parameters
    return PipelineInfo(
        text=TextRules(_MOST_TOKENS, tokenizer=""),
        size_multiple=multiple,
        pixels_per_token=per_token,
        default_params=_defaults(outline, parameters, spatial),
        cfg_scale=cfg_scale,
        distilled_scale="guidance_scale" if {"true_cfg_scale", "guidance_scale"} <= set(parameters) else "",
        needs_negative_prompt=cfg_scale == "true_cfg_scale",
        options=frozenset({"num_frames", "max_sequence_length", "guidance_scale_2"} & set(parameters)),
        min_images=len([name for name in images if name not in OPTIONAL_IMAGES]) if needs_images else 0,
        max_images=MOST_IMAGES if images and images[0] in SEVERAL_IMAGES else len(images),
        takes_mask="mask_image" in images,
        produces="video" if is_video else "image",
        frames_per_latent=frames_per_latent(outline),
        fps=_fps(parameters) if is_video else 0,
        default_size=None if has_size else _size_of_image(multiple),
        lacks=frozenset({"negative_prompt", "height", "width", cfg_scale} - set(parameters)) | _OF_OUR_STEPS,
        extra_fields=extra_fields(diffusers_class),
        call_arguments=lambda params: _call_arguments(fields, params),
        strength=default_of(parameters, "strength", 1.0),
        sizes=tuple((height, width) for width, height in getattr(outline, "resolutions", ())),
    )


def _why_not_servable(diffusers_class: Any, checkpoint: Checkpoint) -> str:
    """What of a class no request could satisfy; '' if there is nothing."""
    parameters = parameters_of(diffusers_class)
    for name in ("prompt", "num_inference_steps"):
        if name not in parameters:
            return f"its __call__ has no {name}"
    given = {"self", "prompt", *IMAGES, *extra_fields(diffusers_class), *DiffusionParams.__struct_fields__}
    for name, parameter in parameters.items():
        is_needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if is_needed and name not in given:
            return f"its __call__ needs {name}, which no request has"
    if not {"height", "num_frames", "video_length", *IMAGES} & set(parameters):
        return "it makes neither images nor videos"
    if "scheduler" not in (checkpoint.read_json(MODEL_INDEX) or {}):
        return "it has no noise scheduler of the name scheduler"
    return ""


def _call_arguments(fields: Sequence[str], params: DiffusionParams) -> dict[str, Any]:
    """The keyword arguments that parameters stand for."""
    given = {name: value for name in fields if (value := getattr(params, name)) is not UNSET and value is not None}
    return given | dict(params.extra)


def _defaults(outline: Any, parameters: Mapping[str, inspect.Parameter], spatial: int) -> DiffusionParams:
    """Those of `__call__`, and what the class puts in the place of those that are None there."""
    named = ("num_inference_steps", "true_cfg_scale", "guidance_scale", "guidance_scale_2", "max_sequence_length")
    given = {name: value for name in named if (value := default_of(parameters, name, None)) is not None}
    height, width = default_sides(outline, spatial)
    given["height"] = default_of(parameters, "height", None) or height
    given["width"] = default_of(parameters, "width", None) or width
    frames = default_of(parameters, "num_frames", None) or denoiser_config(outline).get("sample_frames")
    if "num_frames" in parameters and frames:
        given["num_frames"] = frames
    return DiffusionParams(**given)


def _fps(parameters: Mapping[str, inspect.Parameter]) -> int:
    named = (default_of(parameters, name, None) for name in ("frame_rate", "fps"))
    return next((int(value) for value in named if value), _DEFAULT_FPS)


def _size_of_image(multiple: int) -> Any:
    """The size of results that have that of the first image."""

    def size(sizes: Sequence[ImageSize]) -> ImageSize:
        width, height = sizes[0] if sizes else (DEFAULT_SIDE, DEFAULT_SIDE)
        return max(height // multiple, 1) * multiple, max(width // multiple, 1) * multiple

    return size
