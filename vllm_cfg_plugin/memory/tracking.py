"""Peak bytes of tensors that a computation allocates, counted where nothing is computed: on torch's meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Within it, the storages that operations allocate are counted while they live.

    Attributes:
        live: bytes of those that live now.
        peak: most that lived at a time.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._device = device
        self._known: dict[int, Any] = {}  # of storages: their finalizers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self._device.type:
                self._count(tensor.untyped_storage(), given)
        return out

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)
        if key in self._known or key in given:  # given and not known: it was there before, a weight for example
            return
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self.live -= nbytes
        del self._known[key]


class FusedAttention(TorchFunctionMode):
    """Attention as a GPU's kernels do it: no scores in memory, which torch makes on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = (*args, *(named[name] for name in ("query", "key", "value") if name in named))[:3]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **named)


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[PeakBytes]:
    """Counts what is allocated on the device inside."""
    with FusedAttention(), PeakBytes(device) as counted:
        yield counted
