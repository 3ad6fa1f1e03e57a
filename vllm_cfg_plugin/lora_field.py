"""The field `lora` of a request: which adapters it carries, and how much of each; must not import torch or vLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msgspec import UNSET
from msgspec.structs import replace

from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import LoRA

MAX_SCALE = 4.0
_FORM = 'a list such as [{"name": "pixel", "scale": 0.8}], or a name'


def checked_lora(value: object, named: Mapping[str, LoRA], most: int) -> list[LoRA]:
    """The adapters that a request asks for.

    Args:
        value: a name, {"name": ..., "scale": ...}, or a list of these.
        named: the adapters that there are.
        most: how many a request may carry.

    Raises:
        InvalidRequestError: naming the part that is wrong.
    """
    if value is UNSET or value is None:
        return []
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if items and not most:
        raise InvalidRequestError("lora", value, "absent: this server was started without --enable-lora")
    found = [_checked(item, f"lora[{number}]", named) for number, item in enumerate(items)]
    names = [lora.name for lora in found]
    if len(set(names)) < len(names):
        raise InvalidRequestError("lora", value, "of different adapters: one is named twice")
    if len(found) > most:
        raise InvalidRequestError("lora", value, f"at most {most} adapters (--max-loras)")
    return found


def _checked(item: object, param: str, named: Mapping[str, LoRA]) -> LoRA:
    fields = {"name": item} if isinstance(item, str) else item
    if not isinstance(fields, Mapping) or not {"name"} <= set(fields) <= {"name", "scale"}:
        raise InvalidRequestError(param, item, _FORM)
    name, scale = fields["name"], fields.get("scale", 1.0)
    if not isinstance(name, str) or name not in named:
        known = ", ".join(named) or "there are none"
        raise InvalidRequestError(f"{param}.name", name, f"the name of an adapter of this server ({known})")
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and math.isfinite(scale)
    if not is_number or abs(scale) > MAX_SCALE:
        raise InvalidRequestError(f"{param}.scale", scale, f"a number from {-MAX_SCALE:g} to {MAX_SCALE:g}")
    return replace(named[name], scale=float(scale))
