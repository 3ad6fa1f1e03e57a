"""The adapters that requests may name, as the operator or a call at run time has said; knows no HTTP.

A request takes with it which file its adapters are, so one that is removed here stays until its requests are done.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import UNSET

from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.errors import ConfigurationError, InvalidRequestError, ModelNotFoundError
from vllm_cfg_plugin.params import DiffusionParams, LoRA
from vllm_cfg_plugin.pipelines.adapter_files import find_adapter


class Adapters:
    """Adapters by name.

    Args:
        named: those that there are.
        most: how many a request may carry; 0 where there are no adapters.
    """

    def __init__(self, named: Mapping[str, LoRA] | None = None, most: int = 0) -> None:
        self.named = dict(named or {})
        self.most = most

    @classmethod
    def of(cls, settings: EngineSettings) -> Adapters:
        """Those of the operator."""
        named = {name: find_adapter(name, path) for name, path in settings.lora_modules.items()}
        return cls(named, settings.max_loras_of_requests)

    def find(self, name: str, path: str, in_place: bool = False) -> LoRA:
        """A new adapter, which ranks may read and `add` then makes known.

        Raises:
            InvalidRequestError: there is one of that name already, or the file can't be one; says why.
        """
        if not self.most:
            raise InvalidRequestError("lora_name", name, "absent: this server was started without --enable-lora")
        if name in self.named and not in_place:
            raise InvalidRequestError(
                "lora_name", name, "another name, or load_inplace true: there is one of that name"
            )
        try:
            return find_adapter(name, path)
        except ConfigurationError as error:
            raise unusable(path, str(error)) from error

    def add(self, lora: LoRA) -> None:
        self.named[lora.name] = lora

    def remove(self, name: str) -> None:
        """Have no more requests name it.

        Raises:
            ModelNotFoundError: there is none of that name.
        """
        if name not in self.named:
            raise ModelNotFoundError(f"adapter {name!r} does not exist; there are: {', '.join(self.named) or 'none'}")
        del self.named[name]


def unusable(path: str, problem: str) -> InvalidRequestError:
    """A file that is no adapter of this model."""
    return InvalidRequestError("lora_path", path, f"that of an adapter for this model: {problem}")


def with_adapter(params: DiffusionParams, name: str) -> DiffusionParams:
    """Parameters with one adapter more, before those that they name."""
    asked = params.lora
    listed = [] if asked in (UNSET, None) else asked if isinstance(asked, (list, tuple)) else [asked]
    return msgspec.structs.replace(params, lora=[name, *listed])
