"""vllm_cfg_plugin: stock vLLM serves diffusers pipelines with classifier-free guidance split over ranks (CFG-Parallel).

The public names are imported on first use: vLLM imports this package in every one of its processes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_cfg_plugin.entrypoints.llm import DiffusionLLM
    from vllm_cfg_plugin.entrypoints.output import DiffusionOutput
    from vllm_cfg_plugin.params import DiffusionParams

_PUBLIC = {
    "DiffusionLLM": "vllm_cfg_plugin.entrypoints.llm",
    "DiffusionOutput": "vllm_cfg_plugin.entrypoints.output",
    "DiffusionParams": "vllm_cfg_plugin.params",
}

__all__ = ["DiffusionLLM", "DiffusionOutput", "DiffusionParams"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
