"""What a pipeline class of diffusers says of itself: its `__call__`, and an outline of it without weights.

An outline is an instance whose components are little more than their configurations: what the class computes of those
(how many pixels a latent covers, the size that it draws by itself, the sizes that it refuses) need not be known here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from msgspec import UNSET

from vllm_cfg_plugin.checkpoint import MODEL_INDEX, Checkpoint, ImageSize, PipelineInfo, TextRules
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.params import DiffusionParams

logger = get_logger(__name__)

# Components whose calls are shared among the ranks.
DENOISERS = ("transformer", "transformer_2", "transformer_3", "unet", "prior", "decoder")

_CONFIG_FILES = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
_IMAGES = ("image", "images", "input_images", "reference_image", "mask_image", "control_image", "last_image")
_OPTIONAL_IMAGES = ("reference_image", "last_image")
SEVERAL_IMAGES = ("images", "input_images")  # parameters that take a list
_MOST_IMAGES = 16  # of such a list
# Classes that make nothing without an image, though their `__call__` has a default for it.
_NEED_IMAGES = re.compile(
    "Img2Img|Image2Image|ImageToImage|Inpaint|Fill|Edit|Pix2Pix|I2I|ImageToVideo|Image2Video|I2V|ControlNet|Upscale"
)
# What the engine decides for every request, and what would change the number of steps behind its back.
_OURS = {
    *("prompt", "num_images_per_prompt", "num_videos_per_prompt", "output_type", "return_dict", "callback_steps"),
    *("callback_on_step_end_tensor_inputs", "timesteps", "sigmas", "use_input_image_size_as_output"),
}
_PLAIN_TYPES = {"int", "float", "bool", "str", "list", "tuple", "None", "Optional", "Union", "List", "Tuple"}
_MOST_TOKENS = 2**16
_MULTIPLES = (8, 16, 32, 64, 128)
_DEFAULT_SIDE = 512
_DEFAULT_FPS = 24
# Where classes keep how many pixels and frames a latent covers.
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def parameters_of(diffusers_class: Any) -> Mapping[str, inspect.Parameter]:
    """Of its `__call__`."""
    return _parameters(diffusers_class.__call__)


@cache
def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def image_parameters(diffusers_class: Any) -> list[str]:
    """The parameters that are images, in the order in which a request brings them."""
    return [name for name in _IMAGES if name in parameters_of(diffusers_class)]


def extra_fields(diffusers_class: Any) -> dict[str, str]:
    """The parameters of plain types that are no fields of `DiffusionParams`: name -> annotation."""
    taken = {*_OURS, *DiffusionParams.__struct_fields__, *_IMAGES}
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
    outline = _outline(diffusers_class, checkpoint)
    patch = _patch_size(outline)
    spatial = _first_int(outline, _SPATIAL, 8)
    multiple = _size_multiple(outline, spatial * patch)
    images = image_parameters(diffusers_class)
    needs_images = bool(_NEED_IMAGES.search(diffusers_class.__name__)) or any(
        parameters[name].default is inspect.Parameter.empty for name in images
    )
    cfg_scale = "true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"
    has_size = "height" in parameters and "width" in parameters
    fields = [name for name in DiffusionParams.__struct_fields__ if name in parameters]
    is_video = "num_frames" in parameters or "video_length" in parameters
    return PipelineInfo(
        text=TextRules(_MOST_TOKENS, tokenizer=""),
        size_multiple=multiple,
        pixels_per_token=spatial * patch,
        default_params=_defaults(outline, parameters, spatial),
        cfg_scale=cfg_scale,
        distilled_scale="guidance_scale" if {"true_cfg_scale", "guidance_scale"} <= set(parameters) else "",
        needs_negative_prompt=cfg_scale == "true_cfg_scale",
        options=frozenset({"num_frames", "max_sequence_length", "guidance_scale_2"} & set(parameters)),
        min_images=len([name for name in images if name not in _OPTIONAL_IMAGES]) if needs_images else 0,
        max_images=_MOST_IMAGES if images and images[0] in SEVERAL_IMAGES else len(images),
        takes_mask="mask_image" in images,
        produces="video" if is_video else "image",
        frames_per_latent=_first_int(outline, _TEMPORAL, 1),
        fps=_fps(parameters) if is_video else 0,
        default_size=None if has_size else _size_of_image(multiple),
        lacks=frozenset({"negative_prompt", "height", "width", cfg_scale} - set(parameters)) | {"guidance_interval"},
        extra_fields=extra_fields(diffusers_class),
        call_arguments=lambda params: _call_arguments(fields, params),
        strength=_default(parameters, "strength", 1.0),
        sizes=tuple((height, width) for width, height in getattr(outline, "resolutions", ())),
    )


def _why_not_servable(diffusers_class: Any, checkpoint: Checkpoint) -> str:
    """What of a class no request could satisfy; '' if there is nothing."""
    parameters = parameters_of(diffusers_class)
    for name in ("prompt", "num_inference_steps"):
        if name not in parameters:
            return f"its __call__ has no {name}"
    given = {"self", "prompt", *_IMAGES, *extra_fields(diffusers_class), *DiffusionParams.__struct_fields__}
    for name, parameter in parameters.items():
        is_needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if is_needed and name not in given:
            return f"its __call__ needs {name}, which no request has"
    if not {"height", "num_frames", "video_length", *_IMAGES} & set(parameters):
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
    given = {name: value for name in named if (value := _default(parameters, name, None)) is not None}
    height, width = _default_sides(outline, spatial)
    given["height"] = _default(parameters, "height", None) or height
    given["width"] = _default(parameters, "width", None) or width
    frames = _default(parameters, "num_frames", None) or _denoiser_config(outline).get("sample_frames")
    if "num_frames" in parameters and frames:
        given["num_frames"] = frames
    return DiffusionParams(**given)


def _default(parameters: Mapping[str, inspect.Parameter], name: str, otherwise: Any) -> Any:
    """A parameter's default; `otherwise` where it has none."""
    default = parameters[name].default if name in parameters else None
    return otherwise if default is None or default is inspect.Parameter.empty else default


def _default_sides(outline: Any, spatial: int) -> tuple[int, int]:
    config = _denoiser_config(outline)
    size = getattr(outline, "default_sample_size", None) or config.get("sample_size")
    if size is None and config.get("sample_height"):
        size = config["sample_height"], config["sample_width"]
    if size is None:
        return _DEFAULT_SIDE, _DEFAULT_SIDE
    height, width = (size, size) if isinstance(size, int) else size
    return height * spatial, width * spatial


def _denoiser_config(outline: Any) -> Mapping[str, Any]:
    found = (getattr(outline, name, None) for name in DENOISERS)
    return next((denoiser.config for denoiser in found if denoiser is not None), {})


def _patch_size(outline: Any) -> int:
    """Latents along the side of a token."""
    patch = _denoiser_config(outline).get("patch_size") or 1
    return int(patch if isinstance(patch, int) else patch[-1])


def _first_int(outline: Any, names: Sequence[str], otherwise: int) -> int:
    values = (getattr(outline, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), otherwise)


def _fps(parameters: Mapping[str, inspect.Parameter]) -> int:
    named = (_default(parameters, name, None) for name in ("frame_rate", "fps"))
    return next((int(value) for value in named if value), _DEFAULT_FPS)


def _size_of_image(multiple: int) -> Any:
    """The size of results that have that of the first image."""

    def size(sizes: Sequence[ImageSize]) -> ImageSize:
        width, height = sizes[0] if sizes else (_DEFAULT_SIDE, _DEFAULT_SIDE)
        return max(height // multiple, 1) * multiple, max(width // multiple, 1) * multiple

    return size


def _size_multiple(outline: Any, least: int) -> int:
    """The least multiple of that many pixels whose multiples the class does not refuse."""
    if not hasattr(outline, "check_inputs"):
        return least
    for multiple in (least, *(m for m in _MULTIPLES if m > least)):
        if not _refuses(outline, 7 * multiple):
            return multiple
    return least


def _refuses(outline: Any, side: int) -> bool:
    given = {"prompt": "", "height": side, "width": side, "strength": 1.0, "num_frames": 1}
    named = _parameters(type(outline).check_inputs)
    arguments = {name: given.get(name) for name in named if name != "self" and not name.startswith("kwargs")}
    try:
        outline.check_inputs(**arguments)
    except Exception as error:  # of arguments that are all None: anything
        return "divisible" in str(error) or "multiple of" in str(error)
    return False


class _Component:
    """A component's configuration in its place."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = FrozenDict(config)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["config"][name]
        except KeyError:
            raise AttributeError(name) from None


def _outline(diffusers_class: Any, checkpoint: Checkpoint) -> Any:
    """The pipeline without weights; where it can't be made of configurations, an object with these alone."""
    components = dict(_components(diffusers_class, checkpoint))

    def register_modules(self: Any, **modules: Any) -> None:
        vars(self).update(modules)

    outline_class: Any = type(diffusers_class.__name__, (diffusers_class,), {"register_modules": register_modules})
    try:
        return outline_class(**components)
    except Exception as error:  # of components that are no models: anything
        logger.debug("A %s can't be made of configurations", diffusers_class.__name__, exc_info=error)
    outline = outline_class.__new__(outline_class)
    vars(outline).update(components)
    return outline


def _autoencoder(class_name: str, config: Mapping[str, Any]) -> Any:
    """One without weights, as some compute how many pixels a latent covers; None where it can't be made."""
    try:
        with torch.device("meta"):
            return getattr(diffusers, class_name).from_config(config)
    except Exception as error:  # of a class that is none of diffusers' or has other requirements: anything
        logger.debug("A %s can't be made without weights", class_name, exc_info=error)
        return None


def _components(diffusers_class: Any, checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    index = checkpoint.read_json(MODEL_INDEX) or {}
    for name, parameter in _parameters(diffusers_class.__init__).items():
        value = index.get(name)
        if isinstance(value, list) and len(value) == 2:
            files = (checkpoint.read_json(f"{name}/{file}") for file in _CONFIG_FILES)
            config = next(filter(None, files), {})
            real = _autoencoder(value[1], config) if name == "vae" and value[0] else None
            yield name, real or (_Component(config) if value[0] else None)
        elif name != "self" and (name in index or parameter.default is inspect.Parameter.empty):
            yield name, value
