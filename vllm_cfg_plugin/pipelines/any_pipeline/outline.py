"""A pipeline without weights: an instance of its class whose components are little more than their configurations.

What the class computes of those (how many pixels a latent covers, the size that it draws by itself, the sizes that it
refuses) need not be known here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import logging as diffusers_logging

from vllm_cfg_plugin.checkpoint import MODEL_INDEX, Checkpoint
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.pipelines.any_pipeline.call_parameters import parameters

logger = get_logger(__name__)

# Components whose calls are shared among the ranks.
DENOISERS = ("transformer", "transformer_2", "transformer_3", "unet", "prior", "decoder")

_CONFIG_FILES = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
_MULTIPLES = (8, 16, 32, 64, 128)
DEFAULT_SIDE = 512
# Where classes keep how many pixels and frames a latent covers.
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def outline_of(diffusers_class: Any, checkpoint: Checkpoint) -> Any:
    """The pipeline without weights; where it can't be made of configurations, an object with these alone."""
    components = dict(_components(diffusers_class, checkpoint))

    def register_modules(self: Any, **modules: Any) -> None:
        vars(self).update(modules)

    outline_class: Any = type(diffusers_class.__name__, (diffusers_class,), {"register_modules": register_modules})
    try:
        with _quiet():
            return outline_class(**components)
    except Exception as error:  # of components that are no models: anything
        logger.debug("A %s can't be made of configurations", diffusers_class.__name__, exc_info=error)
    outline = outline_class.__new__(outline_class)
    vars(outline).update(components)
    return outline


def pixels_per_latent(outline: Any) -> int:
    """Along a side."""
    return _first_int(outline, _SPATIAL, 8)


def frames_per_latent(outline: Any) -> int:
    return _first_int(outline, _TEMPORAL, 1)


def default_sides(outline: Any, spatial: int) -> tuple[int, int]:
    config = denoiser_config(outline)
    size = getattr(outline, "default_sample_size", None) or config.get("sample_size")
    if size is None and config.get("sample_height"):
        size = config["sample_height"], config["sample_width"]
    if size is None:
        return DEFAULT_SIDE, DEFAULT_SIDE
    height, width = (size, size) if isinstance(size, int) else size
    return height * spatial, width * spatial


def denoiser_config(outline: Any) -> Mapping[str, Any]:
    found = (getattr(outline, name, None) for name in DENOISERS)
    return next((denoiser.config for denoiser in found if denoiser is not None), {})


def patch_size(outline: Any) -> int:
    """Latents along the side of a token."""
    patch = denoiser_config(outline).get("patch_size") or 1
    return int(patch if isinstance(patch, int) else patch[-1])


def _first_int(outline: Any, names: Sequence[str], otherwise: int) -> int:
    values = (getattr(outline, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), otherwise)


def size_multiple(outline: Any, least: int) -> int:
    """The least multiple of that many pixels whose multiples the class does not refuse."""
    if not hasattr(outline, "check_inputs"):
        return least
    for multiple in (least, *(m for m in _MULTIPLES if m > least)):
        if not _refuses(outline, 7 * multiple):
            return multiple
    return least


def _refuses(outline: Any, side: int) -> bool:
    given = {"prompt": "", "height": side, "width": side, "strength": 1.0, "num_frames": 1}
    named = parameters(type(outline).check_inputs)
    arguments = {name: given.get(name) for name in named if name != "self" and not name.startswith("kwargs")}
    try:
        outline.check_inputs(**arguments)
    except Exception as error:  # of arguments that are all None: anything
        return "divisible" in str(error) or "multiple of" in str(error)
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """What a class warns of when it is made is said when it is loaded."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


class _Component:
    """A component's configuration in its place."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = FrozenDict(config)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["config"][name]
        except KeyError:
            raise AttributeError(name) from None


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
    for name, parameter in parameters(diffusers_class.__init__).items():
        value = index.get(name)
        if isinstance(value, list) and len(value) == 2:
            files = (checkpoint.read_json(f"{name}/{file}") for file in _CONFIG_FILES)
            config = next(filter(None, files), {})
            real = _autoencoder(value[1], config) if name == "vae" and value[0] else None
            yield name, real or (_Component(config) if value[0] else None)
        elif name != "self" and (name in index or parameter.default is inspect.Parameter.empty):
            yield name, value
