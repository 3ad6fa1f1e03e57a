"""What makes a packed transformer of a loaded diffusers model; must not import vLLM."""

from __future__ import annotations

from typing import Any, TypeVar

from vllm_cfg_plugin.worker.packing import LayoutCache

Packed = TypeVar("Packed")


def share_modules(packed_class: type[Packed], transformer: Any) -> Packed:
    """A model of `packed_class`, a subclass of the loaded transformer's class, over the same modules.

    No weight is copied, and what one of the two changes the other sees. It has `_layouts`, for what it knows of the
    layouts it met.
    """
    packed: Any = packed_class.__new__(packed_class)
    packed.__dict__ = transformer.__dict__
    packed._layouts = LayoutCache()
    return packed
