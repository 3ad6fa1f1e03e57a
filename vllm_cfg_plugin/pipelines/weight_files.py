"""Which files of a checkpoint diffusers and transformers would load, asked of their own resolution.

What else lies in a folder is none of our business: another variant's index, a sidecar of the file system. Must not
import torch, diffusers or transformers by itself; it is called when the family's module has done that.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from vllm_cfg_plugin.checkpoint import MODEL_INDEX, Checkpoint, safetensors_problem
from vllm_cfg_plugin.errors import ConfigurationError

_VARIANT = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)\.(\w+?)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
)


def check_weight_files(checkpoint: Checkpoint, family: type, variant: str = "") -> None:
    """Check the components that a pipeline class loads: all files of a folder, the configurations of a repository.

    Args:
        variant: of the files' names, as in `model.fp16.safetensors`; "" for those without one.

    Raises:
        ConfigurationError: a file is missing or broken, or needs what is not installed here.
    """
    folder = Path(checkpoint.model).expanduser()
    for component, names in component_names(checkpoint, family).items():
        _check_quantization(checkpoint, component, *names)
    if not folder.is_dir():
        return
    for component, files in weight_files(checkpoint, family, variant).items():
        for path in files:
            if path.suffix == ".safetensors" and (problem := safetensors_problem(path)):
                raise ConfigurationError(f"model {checkpoint.model!r}: {component}/{path.name} is broken: {problem}")
    for component, names in component_names(checkpoint, family).items():
        if not model_library(*names):
            _check_json_files(checkpoint, folder, component)


def _check_json_files(checkpoint: Checkpoint, folder: Path, component: str) -> None:
    """Of a component without weights, such as a tokenizer: it is there, and its JSON files can be read."""
    paths = [path for path in sorted((folder / component).glob("*.json")) if not path.name.startswith(".")]
    if not paths:
        raise ConfigurationError(f"model {checkpoint.model!r} is incomplete: {component}/ has no JSON files")
    for path in paths:
        try:
            json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"model {checkpoint.model!r}: {component}/{path.name} is broken: {error}"
            ) from error


def weight_files(checkpoint: Checkpoint, family: type, variant: str = "") -> dict[str, list[Path]]:
    """The files of each component of a folder that has weights, as a pipeline class loads them.

    Raises:
        ConfigurationError: a file is missing.
    """
    variants = component_variants(checkpoint, variant)
    return {
        component: _files_of(checkpoint, component, *names, variants.get(component, ""))
        for component, names in component_names(checkpoint, family).items()
        if model_library(*names)
    }


def component_names(checkpoint: Checkpoint, family: type) -> dict[str, tuple[str, str]]:
    """{component: (library, class)} of what the class is made of, as model_index.json names it."""
    index = checkpoint.read_json(MODEL_INDEX) or {}
    taken = inspect.signature(family.__init__).parameters  # type: ignore[misc]
    named = {name: value for name, value in index.items() if name in taken and isinstance(value, list)}
    return {name: (value[0], value[1]) for name, value in named.items() if len(value) == 2 and value[0]}


def component_class(library: str, class_name: str) -> Any:
    """The class that model_index.json names; None for one that neither diffusers nor transformers has."""
    import diffusers
    import transformers

    module: Any = diffusers if library == "diffusers" else getattr(diffusers.pipelines, library, transformers)
    return getattr(module, class_name, None) or getattr(transformers, class_name, None)


def model_library(library: str, class_name: str) -> str:
    """ "diffusers" or "transformers", whose loader a model has; "" for what has no weights."""
    import diffusers
    import transformers

    cls = component_class(library, class_name)
    if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin):
        return "diffusers"
    return "transformers" if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else ""


def component_variants(checkpoint: Checkpoint, variant: str) -> dict[str, str]:
    """{component: variant} of a folder's that have files of the variant; the others load their ordinary ones.

    Raises:
        ConfigurationError: none has any.
    """
    from diffusers.pipelines.pipeline_loading_utils import _identify_model_variants

    if not variant:
        return {}
    folder = Path(checkpoint.model).expanduser()
    try:
        found: dict[str, str] = _identify_model_variants(str(folder), variant, checkpoint.read_json(MODEL_INDEX) or {})
    except IndexError:
        raise ConfigurationError(
            f"variant={variant!r} is not valid for model {checkpoint.model!r}: diffusers can't read a variant where a "
            "component has a file whose name has no dot: remove that file"
        ) from None
    if not found:
        raise ConfigurationError(
            f"variant={variant!r} is not valid for model {checkpoint.model!r}: no component has weights of that name"
        )
    return found


def _files_of(checkpoint: Checkpoint, component: str, library: str, class_name: str, variant: str) -> list[Path]:
    folder = Path(checkpoint.model).expanduser() / component
    resolve = _diffusers_file if model_library(library, class_name) == "diffusers" else _transformers_file
    try:
        path = resolve(folder, variant or None)
    except OSError:
        raise ConfigurationError(_why_not_found(checkpoint, component, folder)) from None
    return _shards(checkpoint, component, path) if path.suffix == ".json" else [path]


def _diffusers_file(folder: Path, variant: str | None) -> Path:
    """The file, or the index of shards, that `ModelMixin.from_pretrained` loads."""
    from diffusers.models.model_loading_utils import _fetch_index_file, _fetch_index_file_legacy
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
    from diffusers.utils.hub_utils import _add_variant, _get_model_file

    unused = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "user_agent")
    options: dict[str, Any] = dict.fromkeys((*unused, "commit_hash"))
    options |= {"is_local": True, "subfolder": "", "use_safetensors": True, "variant": variant}
    options["pretrained_model_name_or_path"] = str(folder)
    index = _fetch_index_file(**options)
    if variant is not None and not index.is_file():
        index = _fetch_index_file_legacy(**options)
    if index is not None and index.is_file():
        return Path(index)
    return Path(_get_model_file(str(folder), weights_name=_add_variant(SAFETENSORS_WEIGHTS_NAME, variant)))


def _transformers_file(folder: Path, variant: str | None) -> Path:
    """The file, or the index of shards, that `PreTrainedModel.from_pretrained` loads."""
    from transformers.modeling_utils import _add_variant
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    # In the order of `transformers.modeling_utils._get_resolved_checkpoint_files`, which hides the index.
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if (path := folder / _add_variant(name, variant)).is_file():
            return path
    raise FileNotFoundError(folder)


def _shards(checkpoint: Checkpoint, component: str, index: Path) -> list[Path]:
    content = checkpoint.read_json(f"{component}/{index.name}") or {}
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ConfigurationError(
            f"model {checkpoint.model!r}: {component}/{index.name} names no files: weight_map must hold the file of "
            "each weight"
        )
    shards = sorted(set(files.values()))
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise ConfigurationError(f"model {checkpoint.model!r} is incomplete: {component}/{shard} is missing")
    return [index.parent / shard for shard in shards]


def _why_not_found(checkpoint: Checkpoint, component: str, folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if variants := sorted({match[1] for name in names if (match := _VARIANT.fullmatch(name))}):
        return (
            f"model {checkpoint.model!r}: {component}/ has its weights under names of the variant {variants[0]} only: "
            f"ask for it by --variant {variants[0]} (variant={variants[0]!r} offline)"
        )
    if pickled := [name for name in names if name.endswith((".bin.index.json", ".bin")) and not name.startswith(".")]:
        return (
            f"model {checkpoint.model!r}: {component}/ has its weights as pickles ({pickled[0]}), which are not "
            "loaded: save it as safetensors (`save_pretrained`)"
        )
    return f"model {checkpoint.model!r} is incomplete: {component}/ has no file of weights"


def _check_quantization(checkpoint: Checkpoint, component: str, library: str, class_name: str) -> None:
    """What its library can run here may run; each library's own quantizer knows."""
    config = (checkpoint.read_json(f"{component}/config.json") or {}).get("quantization_config")
    of = model_library(library, class_name) if config is not None else ""
    if not of or (of == "transformers" and not config):  # an empty one is none to some of its models; not to diffusers
        return
    if of == "transformers" and not _is_known_method(config):
        return  # with a warning, transformers loads the weights as they are
    method = config.get("quant_method") or "an unnamed method" if isinstance(config, dict) else repr(config)
    try:
        _quantizers(of).from_config(dict(config or {}), pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # of any quantizer: a missing package, no GPU, an unknown method
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"model {checkpoint.model!r}: {component}/ is quantized by {method}, which can't run here: {reason}"
        ) from error


def _is_known_method(config: Any) -> bool:
    """Whether transformers has a quantizer of this name, or refuses the configuration."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = config.get("quant_method") if isinstance(config, dict) else None
    return not isinstance(method, str) or method in AUTO_QUANTIZATION_CONFIG_MAPPING


def _quantizers(library: str) -> Any:
    if library == "diffusers":
        from diffusers.quantizers import DiffusersAutoQuantizer

        return DiffusersAutoQuantizer
    from transformers.quantizers import AutoHfQuantizer

    return AutoHfQuantizer
