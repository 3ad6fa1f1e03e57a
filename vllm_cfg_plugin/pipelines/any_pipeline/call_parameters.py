"""The parameters of a pipeline class' `__call__`: its images, and the fields that a request may have beyond ours."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from vllm_cfg_plugin.params import DiffusionParams

IMAGES = ("image", "images", "input_images", "reference_image", "mask_image", "control_image", "last_image")
OPTIONAL_IMAGES = ("reference_image", "last_image")
SEVERAL_IMAGES = ("images", "input_images")  # parameters that take a list
MOST_IMAGES = 16  # of such a list
# Classes that make nothing without an image, though their `__call__` has a default for it.
NEED_IMAGES = re.compile(
    "Img2Img|Image2Image|ImageToImage|Inpaint|Fill|Edit|Pix2Pix|I2I|ImageToVideo|Image2Video|I2V|ControlNet|Upscale"
)
# What the engine decides for every request, and what would change the number of steps behind its back.
_OURS = {
    *("prompt", "num_images_per_prompt", "num_videos_per_prompt", "output_type", "return_dict", "callback_steps"),
    *("callback_on_step_end_tensor_inputs", "timesteps", "sigmas", "use_input_image_size_as_output"),
}
_PLAIN_TYPES = {"int", "float", "bool", "str", "list", "tuple", "None", "Optional", "Union", "List", "Tuple"}


def parameters_of(diffusers_class: Any) -> Mapping[str, inspect.Parameter]:
    """Of its `__call__`."""
    return parameters(diffusers_class.__call__)


@cache
def parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def image_parameters(diffusers_class: Any) -> list[str]:
    """The parameters that are images, in the order in which a request brings them."""
    return [name for name in IMAGES if name in parameters_of(diffusers_class)]


def extra_fields(diffusers_class: Any) -> dict[str, str]:
    """The parameters of plain types that are no fields of `DiffusionParams`: name -> annotation."""
    taken = {*_OURS, *DiffusionParams.__struct_fields__, *IMAGES}
    plain = {
        name: _plain_annotation(parameter)
        for name, parameter in parameters_of(diffusers_class).items()
        if name not in taken and "latents" not in name
    }
    return {name: annotation for name, annotation in plain.items() if annotation}


def _plain_annotation(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = text.replace("typing.", "").replace("NoneType", "None")
    words = set(re.findall(r"[\w.]+", text))
    if not words or not words <= _PLAIN_TYPES:
        return ""
    return text if parameter.default is not None or "None" in words else f"{text} | None"


def default_of(parameters: Mapping[str, inspect.Parameter], name: str, otherwise: Any) -> Any:
    """A parameter's default; `otherwise` where it has none."""
    default = parameters[name].default if name in parameters else None
    return otherwise if default is None or default is inspect.Parameter.empty else default
