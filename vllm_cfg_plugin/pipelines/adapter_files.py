"""Which file an adapter is, and whether it may be read at all; must not import torch, diffusers or vLLM by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllm_cfg_plugin.checkpoint import Checkpoint, safetensors_problem
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.params import LoRA
from vllm_cfg_plugin.pipelines.registry import pipeline_class

_SUFFIX = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Of the names under which peft and diffusers save an adapter in a folder.
_USUAL_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def find_adapter(name: str, path: str) -> LoRA:
    """The adapter of a file, or of a folder with one.

    Raises:
        ConfigurationError: there is none that may be read; says why.
    """
    file = _file_of(name, Path(path).expanduser())
    if file.suffix != _SUFFIX:
        raise ConfigurationError(f"adapter {name!r}: {file} is no {_SUFFIX} file{_remedy(file)}")
    if problem := safetensors_problem(file):
        raise ConfigurationError(f"adapter {name!r}: {file} is broken: {problem}")
    return LoRA(name, str(file.resolve()), key_of(file))


def key_of(file: Path) -> str:
    """Names the content of a file without reading it.

    Raises:
        OSError: there is no such file.
    """
    status = file.resolve().stat()
    return f"{file.resolve()}:{status.st_mtime_ns}:{status.st_size}"


def check_adapters(checkpoint: Checkpoint, modules: Mapping[str, str]) -> None:
    """Check that a model takes adapters, and that those of the operator can be read.

    Raises:
        ConfigurationError: says why not.
    """
    transformer = getattr(pipeline_class(checkpoint), "adopted", {}).get("transformer")
    if not hasattr(transformer, "modulation_layers"):
        raise ConfigurationError(
            f"enable_lora is not valid for model {checkpoint.model!r}: forwards of a {checkpoint.class_name()} don't "
            "know adapters of single requests; merge one into the checkpoint"
        )
    for name, path in modules.items():
        find_adapter(name, path)


def _file_of(name: str, path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigurationError(f"adapter {name!r}: there is no file or folder {path}")
    files = sorted(path.glob(f"*{_SUFFIX}"))
    usual = [file for file in files if file.name in _USUAL_NAMES]
    if len(usual) == 1 or len(files) == 1:
        return (usual or files)[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise ConfigurationError(f"adapter {name!r}: {path} has several {_SUFFIX} files, name one of them: {names}")
    pickles = [file for file in sorted(path.iterdir()) if file.suffix in _PICKLES]
    raise ConfigurationError(f"adapter {name!r}: {path} has no {_SUFFIX} file{_remedy(*pickles[:1])}")


def _remedy(*files: Path) -> str:
    if files and files[0].suffix in _PICKLES:
        return f": {files[0].name} is a pickle, which is not loaded: save it as safetensors"
    return ""
