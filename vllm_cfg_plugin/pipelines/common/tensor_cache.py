"""LRU cache of tensors, limited by total bytes; must import nothing but torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from threading import Lock
from typing import Any, Generic, Self, TypeVar

import torch

Value = TypeVar("Value")

# Of a value without its tensors: keeps a cache of many small ones bounded too.
_OVERHEAD_BYTES = 4096


class TensorCache(Generic[Value]):
    """LRU cache of values made of tensors, limited by total bytes; the latest value stays whatever its size.

    Safe for threads, and none waits for what another one makes. A deep copy is a new, empty cache: that of a model
    whose copy may change.

    Args:
        capacity_bytes: of all tensors, and some for each value.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._bytes = 0
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made if it is not here."""
        with self._lock:
            if (value := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
                return value
        made = make()
        with self._lock:
            value = self._entries.setdefault(key, made)
            self._entries.move_to_end(key)
            if value is not made:  # another thread was faster
                return value
            self._bytes += _size(value)
            while self._bytes > self._capacity_bytes and len(self._entries) > 1:
                _, evicted = self._entries.popitem(last=False)
                self._bytes -= _size(evicted)
            return value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self._capacity_bytes)


def _size(value: object) -> int:
    return _OVERHEAD_BYTES + _tensor_bytes(value)


def _tensor_bytes(value: object) -> int:
    """Bytes of the tensors in a tensor, a dataclass, a list or a tuple of such."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if is_dataclass(value):
        return sum(_tensor_bytes(getattr(value, field.name)) for field in fields(value))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0
