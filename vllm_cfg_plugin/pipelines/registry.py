"""The pipelines this plugin serves: diffusers class name -> the class that serves it, and what that says of a model.

A pipeline of this package has a line in `FAMILIES`; one of another package is an entry point of that package in the
group `ENTRY_POINTS`. Must not import torch, diffusers or vLLM by itself: describing a checkpoint imports its family's
module, and nothing else does.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from math import prod
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_cfg_plugin.checkpoint import DEFAULTS_FILE, MODEL_INDEX, Checkpoint, PipelineInfo
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.params import GUIDANCE_FIELDS, DiffusionParams
from vllm_cfg_plugin.pipelines.weight_files import check_weight_files

if TYPE_CHECKING:
    from vllm_cfg_plugin.pipelines.base import EnginePipeline

logger = get_logger(__name__)

_PIPELINES = "vllm_cfg_plugin.pipelines"
ENTRY_POINTS = _PIPELINES  # the group; an entry point there is `ClassName = "package.module:Class"`

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


ANY_PIPELINE = f"{_PIPELINES}.any_pipeline.classes"  # has a class for each class of diffusers, by its name


# What vLLM is told of models whose class no family stands for: diffusers has too many to name each.
ANY_ARCHITECTURE = "DiffusionPipeline"


def class_names() -> set[str]:
    """The diffusers classes that a family stands for, of this package or of another one."""
    return {*FAMILIES, *_of_other_packages()}


def architectures() -> set[str]:
    """The architectures of all models that are served, as vLLM names them."""
    return {*class_names(), ANY_ARCHITECTURE}


def architecture_of(checkpoint: Checkpoint) -> str:
    """One of `architectures`.

    Raises:
        ConfigurationError: see `implementation_of`.
    """
    point = _entry_point_of(checkpoint)
    return ANY_ARCHITECTURE if point.module == ANY_PIPELINE else point.name


@cache
def _of_other_packages() -> dict[str, list[EntryPoint]]:
    """The entry points of each class name."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        found.setdefault(point.name, []).append(point)
    return found


def implementation_of(checkpoint: Checkpoint) -> str:
    """ "module:Class" of the pipeline that serves a checkpoint.

    Raises:
        ConfigurationError: not a diffusers checkpoint, of a class that neither diffusers nor anybody else has (names
            those that are served), or of one that several packages serve.
    """
    return _entry_point_of(checkpoint).value


def _entry_point_of(checkpoint: Checkpoint) -> EntryPoint:
    class_name = checkpoint.class_name()
    if class_name is None:
        raise ConfigurationError(
            f"model {checkpoint.model!r} is not a diffusers checkpoint: it has no {MODEL_INDEX} that names a pipeline "
            "class"
        )
    if class_name in FAMILIES:
        return EntryPoint(class_name, FAMILIES[class_name], ENTRY_POINTS)
    match _of_other_packages().get(class_name, []):
        case [point]:
            return point
        case [] if _is_in_diffusers(class_name):
            return EntryPoint(class_name, f"{ANY_PIPELINE}:{class_name}", ENTRY_POINTS)
        case []:
            raise ConfigurationError(
                f"model {checkpoint.model!r} is a {class_name}, which this plugin does not serve; it serves all "
                f"pipelines of the installed diffusers and, with batched forwards: {', '.join(sorted(class_names()))}"
            )
        case points:
            packages = " and ".join(_package(point) for point in points)
            raise ConfigurationError(
                f"model {checkpoint.model!r} is a {class_name}, which {packages} serve: uninstall all but one"
            )


@cache
def _is_in_diffusers(class_name: str) -> bool:
    import diffusers

    return class_name in dir(diffusers) and class_name.endswith("Pipeline")


def pipeline_class(checkpoint: Checkpoint) -> type[EnginePipeline]:
    """The class that serves a checkpoint; importing it also imports diffusers and transformers.

    Raises:
        ConfigurationError: see `implementation_of`; the class of another package can't be used.
    """
    point = _entry_point_of(checkpoint)
    if point.dist is None:  # ours
        ours: type[EnginePipeline] = point.load()
        return ours
    try:
        cls = point.load()
    except Exception as error:  # of somebody else's code: anything
        problem = f"it can't be imported: {type(error).__name__}: {error}"
    else:
        problem = _why_no_pipeline(cls)
        if not problem:
            return cls
    raise ConfigurationError(
        f"model {checkpoint.model!r} is a {point.name}, which {_package(point)} serves by {point.value!r}, but "
        f"{problem}"
    )


def _why_no_pipeline(cls: Any) -> str:
    """Why an object is no class that the engine can run; '' if it is one."""
    from vllm_cfg_plugin.pipelines.base import EnginePipeline

    if not (isinstance(cls, type) and issubclass(cls, EnginePipeline)):
        return f"that is not a class derived from {EnginePipeline.__module__}.{EnginePipeline.__name__}"
    if missing := sorted(cls.__abstractmethods__):
        return f"that class lacks {', '.join(missing)}"
    return ""


def _package(point: EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist else "this plugin"


def _warn_of_claims(class_name: str) -> None:
    """A class of ours stays ours."""
    for point in _of_other_packages().get(class_name, []) if class_name in FAMILIES else []:
        logger.warning(
            "%s is served by this plugin itself: %r of %s is not used", class_name, point.value, _package(point)
        )


def check_servable(
    checkpoint: Checkpoint, variant: str = "", sequence_parallel_size: int = 1, tensor_parallel_size: int = 1
) -> None:
    """Everything that can be known to be wrong with a checkpoint before a process is started.

    Args:
        variant: of the names of its weight files.
        sequence_parallel_size, tensor_parallel_size: of the processes that are to share its forwards.

    Raises:
        ConfigurationError: unknown class, missing components, missing or unreadable component configs, a noise
            scheduler that the family can't set, missing or truncated weight files, heads that can't be shared.
    """
    point = _entry_point_of(checkpoint)
    _warn_of_claims(point.name)
    if point.module == ANY_PIPELINE:
        logger.info(
            "%s has no batched forwards here: each request runs the pipeline of diffusers by itself, and the ranks "
            "share the branches of its guidance",
            point.name,
        )
    checkpoint.check_components()
    _check_noise_schedule(checkpoint, describe(checkpoint))
    check_weight_files(checkpoint, pipeline_class(checkpoint).loaded_class(), variant)
    sizes = {"sequence_parallel_size": sequence_parallel_size, "tensor_parallel_size": tensor_parallel_size}
    check_sharing(checkpoint, **sizes)


def check_sharing(checkpoint: Checkpoint, **sizes: int) -> None:
    """Check that processes can share the model's forwards: so many in each way, `sequence_parallel_size` for one.

    Raises:
        ConfigurationError: they can't, or there are heads that can't be shared.
    """
    cls, sizes = pipeline_class(checkpoint), {name: size for name, size in sizes.items() if size > 1}
    for name, size in sizes.items():
        if not cls.heads_field or (name == "tensor_parallel_size" and not cls.tensor_plans()):
            raise ConfigurationError(
                f"{name}={size} is not valid for {cls.__name__}, whose forwards can't be shared so: leave it out "
                "(cfg_parallel_size shares branches)"
            )
    heads, asked = 0, " x ".join(f"{name}={size}" for name, size in sizes.items())
    if sizes:
        heads = checkpoint.component_config("transformer").get(cls.heads_field, 0)
    if heads % prod(sizes.values()):
        raise ConfigurationError(
            f"{asked} is not valid: it must divide the {heads} attention heads of the model (transformer/config.json: "
            f"{cls.heads_field})"
        )


def _check_noise_schedule(checkpoint: Checkpoint, info: PipelineInfo) -> None:
    """Check that this family can set the noise scheduler to the model's own number of steps."""
    steps = info.default_params.num_inference_steps
    try:
        info.num_timesteps(2 if steps is msgspec.UNSET else steps)  # one is too few for some
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"model {checkpoint.model!r}: scheduler/scheduler_config.json: {error}") from error


def describe(checkpoint: Checkpoint) -> PipelineInfo:
    """What a checkpoint can do; its `generation_config.json` overrides the family's defaults.

    Raises:
        ConfigurationError: see `implementation_of`; missing or unreadable configurations.
    """
    from vllm_cfg_plugin.pipelines.noise_scheduler import timestep_counter

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
    if ignored := sorted(set(raw) & (info.lacks | GUIDANCE_FIELDS - family.guidance_fields)):
        raise ConfigurationError(
            f"model {checkpoint.model!r}: {DEFAULTS_FILE} sets {ignored[0]}, which a {family.__name__} does not read"
        )
    given = {
        name: value for name in defaults.__struct_fields__ if (value := getattr(defaults, name)) is not msgspec.UNSET
    }
    return dataclasses.replace(
        info,
        default_params=msgspec.structs.replace(info.default_params, **given),
        guidance_fields=family.guidance_fields,
        num_timesteps=timestep_counter(checkpoint, family.set_timesteps),
    )
