"""Adapter files as people have them -> `Adapter` of a loaded pipeline; must not import vLLM.

diffusers' own converters read kohya's, ComfyUI's and other trainers' names (`lora_state_dict` of the pipeline's class);
peft's and diffusers' own layouts need none. What can't be applied exactly is refused, with the name of the first key.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open

from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.params import LoRA
from vllm_cfg_plugin.pipelines.adapter_files import key_of
from vllm_cfg_plugin.pipelines.adapters import Adapter, LowRank, adaptable_layers, makes_modulations, name_layer

Tensors = dict[str, torch.Tensor]

_RANK_MULTIPLE = 8  # a product whose rank is padded to it has the same bits for any number of rows, see `low_rank.py`
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# What is no low-rank product of two matrices -> what it is.
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "LoCon",
}


def read_adapter(lora: LoRA, pipeline: Any, max_rank: int) -> Adapter:
    """Read an adapter for a pipeline's transformers, on the CPU and in their dtype.

    Raises:
        ConfigurationError: it can't be read, or does not fit; says why.
    """
    try:
        if key_of(Path(lora.path)) != lora.key:
            raise ConfigurationError(f"adapter {lora.name!r}: {lora.path} has changed: load it again")
        tensors, alphas = _in_peft_layout(type(pipeline), *_read(Path(lora.path)))
        return _fit(lora, pipeline, tensors, alphas, max_rank)
    except ConfigurationError:
        raise
    except _Unfit as error:
        raise ConfigurationError(f"adapter {lora.name!r} does not fit: {error}") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        # The converters fail in such ways on names that they don't know.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigurationError(f"adapter {lora.name!r}: {lora.path} can't be read: {reason}") from error


class _Unfit(Exception):
    """Why an adapter can't be applied."""


@dataclass(frozen=True)
class _Alphas:
    """The alpha of each layer: a product is weighed by alpha / rank. Without one it is weighed by 1.

    Attributes:
        default: of layers that no pattern names.
        patterns: as peft matches them: the end of a layer's name, as a regular expression.
        is_rank_stabilised: weighed by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732.
    """

    default: float | None = None
    patterns: Mapping[str, float] | None = None
    is_rank_stabilised: bool = False

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> _Alphas:
        if config.get("use_dora"):
            raise _Unfit("it is a DoRA, which is not supported")
        if config.get("lora_bias") or config.get("bias", "none") != "none":
            raise _Unfit("it has biases, which are not supported")
        return cls(config.get("lora_alpha"), config.get("alpha_pattern"), bool(config.get("use_rslora")))

    def weight(self, layer: str, rank: int) -> float:
        alpha = self.default
        for pattern, value in (self.patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern.removeprefix('^')})$", layer):
                alpha = value
                break
        if alpha is None:
            return 1.0
        return float(alpha) / (rank**0.5 if self.is_rank_stabilised else rank)


def _read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a file, and the configuration that peft or diffusers saved with it, by component."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        metadata = (file.metadata() or {}).get(_DIFFUSERS_METADATA)
    if metadata:
        return tensors, json.loads(metadata)
    beside = path.with_name("adapter_config.json")
    if beside.is_file():
        return tensors, {f"transformer.{name}": value for name, value in json.loads(beside.read_bytes()).items()}
    return tensors, {}


def _in_peft_layout(family: type, tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, _Alphas]:
    """Tensors named `component.layer.lora_A.weight` and `.lora_B.weight`, and the layers' alphas."""
    for key in tensors:
        for mark, kind in _OTHER_KINDS.items():
            if mark in key:
                raise _Unfit(f"{key} is a part of a {kind}, which is not supported: only LoRA is")
    if all(key.startswith(_PEFT_PREFIX) for key in tensors):
        tensors = {key.removeprefix(_PEFT_PREFIX): value for key, value in tensors.items()}
    else:
        tensors = _converted(family, tensors)
    if not any(_DOWN in key for key in tensors):
        tensors = convert_unet_state_dict_to_peft(tensors)
    own = {
        name.removeprefix("transformer."): value for name, value in config.items() if name.startswith("transformer.")
    }
    alphas = _Alphas.of_config(own)
    of_keys = {key.removesuffix(".alpha"): tensors.pop(key).item() for key in [*tensors] if key.endswith(".alpha")}
    if of_keys:
        patterns = {re.escape(_layer_of(layer)[1]): alpha for layer, alpha in of_keys.items()}
        alphas = _Alphas(alphas.default, patterns | dict(alphas.patterns or {}), alphas.is_rank_stabilised)
    return tensors, alphas


def _converted(family: Any, tensors: Tensors) -> Tensors:
    """With diffusers' names, where diffusers knows how; a family without adapters there has no other names."""
    if not hasattr(family, "lora_state_dict"):
        return tensors
    if "return_alphas" not in inspect.signature(family.lora_state_dict).parameters:
        converted: Tensors = family.lora_state_dict(dict(tensors))
        return converted
    converted, alphas = family.lora_state_dict(dict(tensors), return_alphas=True)
    return converted | (alphas or {})


def _layer_of(name: str) -> tuple[str, str]:
    """(component, layer) of `component.layer`; without a component it is of the transformer."""
    component, _, layer = name.partition(".")
    return (
        (component, layer)
        if component.startswith(("transformer_2", "text_encoder")) or component == "transformer"
        else ("transformer", name)
    )


def _fit(lora: LoRA, pipeline: Any, tensors: Tensors, alphas: _Alphas, max_rank: int) -> Adapter:
    layers: dict[str, LowRank] = {}
    left, modulates = dict(tensors), False
    for key in tensors:
        if not key.endswith(_DOWN):
            continue
        name = key.removesuffix(_DOWN)
        up = left.pop(name + _UP, None)
        if up is None:
            raise _Unfit(f"{key} has no {name + _UP} beside it")
        component, layer = _layer_of(name)
        model = _component(pipeline, component, key)
        module = adaptable_layers(model).get(layer)
        if module is None:
            raise _Unfit(f"{key} fits no layer of the model{_why_closed(model, layer)}")
        down = left.pop(key)
        _check_shapes(key, down, up, module, max_rank)
        adapted_as = f"{component}.{layer}"
        name_layer(module, adapted_as)
        layers[adapted_as] = _low_rank(down, up * alphas.weight(layer, down.shape[0]), next(model.parameters()).dtype)
        modulates |= makes_modulations(model, layer)
    if left:
        raise _Unfit(f"{min(left)} fits no layer of the model")
    if not layers:
        raise _Unfit("it has no layers")
    return Adapter(lora.key, layers, modulates)


def _component(pipeline: Any, name: str, key: str) -> Any:
    if name.startswith("text_encoder"):
        raise _Unfit(f"{key} adapts a text encoder, which is not supported: leave these keys out of the file")
    model = getattr(pipeline, name, None)
    if model is None:
        raise _Unfit(f"{key} adapts {name}, and this model has none")
    return model


def _why_closed(model: Any, layer: str) -> str:
    is_there = layer in dict(model.named_modules())
    return ": it is none that adapters of requests can adapt" if is_there else ""


def _check_shapes(key: str, down: torch.Tensor, up: torch.Tensor, module: Any, max_rank: int) -> None:
    rank = down.shape[0]
    if (
        down.dim() != 2
        or up.dim() != 2
        or down.shape[1] != module.in_features
        or up.shape != (module.out_features, rank)
    ):
        raise _Unfit(
            f"{key} has shape {list(down.shape)} and its other half {list(up.shape)}, but the layer has "
            f"{module.in_features} inputs and {module.out_features} outputs"
        )
    if rank > max_rank:
        raise _Unfit(f"{key} has rank {rank}, and --max-lora-rank is {max_rank}")
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise _Unfit(f"{key} or its other half is not finite (NaN or infinity)")


def _low_rank(down: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> LowRank:
    padding = -down.shape[0] % _RANK_MULTIPLE
    return LowRank(
        F.pad(down, [0, 0, 0, padding]).to(dtype).contiguous(), F.pad(up, [0, padding]).to(dtype).contiguous()
    )
