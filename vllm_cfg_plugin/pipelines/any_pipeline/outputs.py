"""What a pipeline's `__call__` is given for a request, and what becomes of what it returns; must not import vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vllm_cfg_plugin.errors import InputsRefusedError
from vllm_cfg_plugin.params import DiffusionRequest, ImageInput
from vllm_cfg_plugin.pipelines.any_pipeline.call_parameters import (
    SEVERAL_IMAGES,
    extra_fields,
    image_parameters,
    parameters_of,
)
from vllm_cfg_plugin.pipelines.base import to_pil


def arguments_of(diffusers_class: Any, request: DiffusionRequest) -> dict[str, Any]:
    """All arguments but the generator."""
    extra = extra_fields(diffusers_class)
    given = {name: _as_annotated(value, extra.get(name, "")) for name, value in (request.call or {}).items()}
    arguments = {"prompt": request.prompts[0], **given}
    arguments |= _images(image_parameters(diffusers_class), request.images)
    if "output_type" in parameters_of(diffusers_class):
        arguments["output_type"] = "np"
    return arguments


def _as_annotated(value: Any, annotation: str) -> Any:
    """What is a tuple to a pipeline is a list in JSON."""
    return tuple(value) if isinstance(value, list) and "tuple" in annotation and "list" not in annotation else value


def _images(names: Sequence[str], images: Sequence[ImageInput]) -> dict[str, Any]:
    """The images by the names of their parameters."""
    if not images:
        return {}
    if names[0] in SEVERAL_IMAGES:
        return {names[0]: [to_pil(image).convert("RGB") for image in images]}
    return {
        name: _mask(image) if "mask" in name else to_pil(image).convert("RGB")
        for name, image in zip(names, images, strict=False)
    }


def _mask(image: ImageInput) -> Image.Image:
    """White where the image is to be changed; of one with an alpha channel, where that is transparent (OpenAI)."""
    picture = to_pil(image)
    if picture.mode == "RGBA":
        return picture.getchannel("A").point(lambda alpha: 255 - alpha)
    return picture.convert("L")


def pixels_of(result: Any, request: DiffusionRequest) -> torch.Tensor:
    """The images or frames that a pipeline returned: uint8 [number, height, width, channels] on the CPU.

    Raises:
        TypeError: it returned something else.
        InputsRefusedError: they are not as large or as many as was asked.
    """
    pixels = _pixels(result)
    made = dict(zip(("num_frames", "height", "width"), pixels.shape, strict=False))
    asked = {name: value for name, value in (request.call or {}).items() if name in made}
    if any(made[name] != value for name, value in asked.items()):
        raise InputsRefusedError(
            f"the pipeline made {_words({name: made[name] for name in asked})} where it was asked for {_words(asked)}: "
            "ask for that, some pipelines change sizes to those that suit them"
        )
    return pixels


def _words(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _pixels(result: Any) -> torch.Tensor:
    value = result[0]
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):  # videos, frame by frame
        value = value[0]
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (Image.Image, np.ndarray)):
        value = np.stack([np.asarray(each) for each in value])
    if isinstance(value, torch.Tensor):
        value = value.float().cpu().numpy()
    if not isinstance(value, np.ndarray) or value.ndim not in (4, 5):
        raise TypeError(f"{type(result).__name__} holds neither images nor videos, but a {type(value).__name__}")
    if value.ndim == 5:
        value = value[0]
    if value.dtype == np.uint8:
        return torch.from_numpy(value)
    return torch.from_numpy((value.clip(0, 1) * 255).round().astype(np.uint8))  # as diffusers rounds them
