"""A GPU that computes nothing, on torch's CPU build: it knows shapes, dtypes and devices, and counts what it is asked.

Tensors on it are torch's fake ones: mixing devices raises, and what they hold can't be read. What stays on the CPU is
computed for real, as it is beside a GPU.
"""

from __future__ import annotations

import ctypes
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda:0")
_CUDA, _META = 1, 14  # numbers of the device types in torch
CAPABILITY = (9, 0)  # of an H100

_aten = torch.ops.aten
# They make or describe tensors, and start no kernel.
_FREE = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.detach.default,
    _aten.lift_fresh.default,
    _aten.record_stream.default,
    _aten._unsafe_view.default,
    _aten.is_pinned.default,
    torch.ops.prim.device.default,
}
# They are one kernel on a GPU, and several operations elsewhere.
_UNDIVIDED = {_aten._fused_rms_norm.default}
# The size of their result, or their result itself, is waited for.
_WAITED_FOR = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.unique_consecutive.default,
    _aten._unique2.default,
    _aten._linalg_check_errors.default,
}
_PIN = {_aten.pin_memory.default, _aten._pin_memory.default}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}


@dataclass
class Counts:
    """What a GPU was asked to do.

    Attributes:
        launches: kernels, by operation.
        uploads, downloads: copies from the host and to it that nobody waits for, by the line of ours that made them.
        syncs: where the host waits for all that is queued, by the line of ours.
    """

    launches: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    downloads: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)


class FakeCuda(TorchDispatchMode):
    """Sends what concerns a GPU to fake tensors and everything else to the CPU.

    Attributes:
        counts: since the last `start_counting`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def start_counting(self) -> Counts:
        """New counts, which grow from now on."""
        self.counts = Counts()
        return self.counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not any(map(_is_on_gpu, tree_leaves((args, kwargs)))):
            return _on_host(func, args, kwargs)
        if (
            func not in _UNDIVIDED
            and func.namespace != "prim"
            and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        ):
            with self:  # in inference mode such operations come undivided
                return func.decompose(*args, **kwargs)
        self._count(func, args, kwargs)
        if func is _aten._local_scalar_dense.default:
            return 0  # counted
        if func in _COPIES and _crosses(func, args, kwargs):
            return _copied(func, args, kwargs)
        return func(*args, **kwargs)

    def _count(self, func: Any, args: Any, kwargs: Any) -> None:
        if func in _COPIES and _crosses(func, args, kwargs):
            into = func is _aten.copy_.default
            to_gpu = (args[0].device if into else kwargs["device"]).type == "cuda"
            host = args[1] if into and to_gpu else args[0]
            # What is not pinned is copied to where it is first, and that may wait.
            is_async = (args[2:] == (True,) if into else kwargs.get("non_blocking")) and hasattr(host, "is_pinned_here")
            counted = (self.counts.uploads if to_gpu else self.counts.downloads) if is_async else self.counts.syncs
            counted[_line_of_ours(func)] += 1
        elif func in _WAITED_FOR or _is_boolean_index(func, args):
            self.counts.syncs[_line_of_ours(func)] += 1
        elif func not in _FREE and not _is_view(func):
            self.counts.launches[func._schema.name.removeprefix("aten::")] += 1


def _is_on_gpu(leaf: object) -> bool:
    """Whether an argument is a tensor on the GPU, or the GPU itself."""
    return isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf.type == "cuda")


def _on_host(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation beside the GPU returns. Torch's CPU build has no pinned memory: such tensors are marked."""
    is_pinned = kwargs.pop("pin_memory", False)
    with unset_fake_temporarily():
        if func in _PIN:
            is_pinned, result = True, args[0].clone()
        else:
            result = func(*args, **kwargs)
    if is_pinned:
        result.is_pinned_here = True
    return result


def _crosses(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a copy is one between host and GPU."""
    if func is _aten.copy_.default:
        return args[0].device.type != args[1].device.type
    target = kwargs.get("device")
    return target is not None and torch.device(target).type != args[0].device.type


def _copied(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """What a copy between host and GPU returns; zeros on the host."""
    if func is _aten.copy_.default:
        with unset_fake_temporarily():
            return args[0] if isinstance(args[0], FakeTensor) else args[0].zero_()
    made = {"dtype": kwargs.get("dtype") or args[0].dtype, "device": kwargs["device"]}
    if isinstance(args[0], FakeTensor):
        with unset_fake_temporarily():
            return torch.zeros(args[0].shape, **made)
    return torch.empty(args[0].shape, **made)


def _is_view(func: Any) -> bool:
    """Whether it returns a view of an argument, or several."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _is_boolean_index(func: Any, args: Any) -> bool:
    if func not in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def _line_of_ours(func: Any) -> str:
    """The innermost line of this package, and the line that it called in diffusers or torch."""
    frames = [frame for frame in traceback.extract_stack()[:-3] if "vllm_cfg_plugin" in frame.filename]
    frames = [f for f in frames if "/tests/" not in f.filename] or traceback.extract_stack()[-8:-3]
    last = frames[-1]
    return f"{func._schema.name}: {Path(last.filename).name}:{last.lineno} {last.line}"


class FakeEvent:
    """It is reached at once."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._seconds = 0.0

    def record(self, stream: FakeStream) -> None:
        self._seconds = time.monotonic()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """It is reached."""

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end._seconds - self._seconds)


class FakeStream:
    """It is empty."""

    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        self.device = device
        self.priority = priority

    def wait_stream(self, stream: FakeStream) -> None:
        """Both are empty."""

    def wait_event(self, event: FakeEvent) -> None:
        """It is reached."""


def to_fake(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and dtype on the GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)


def move_to_gpu(module: torch.nn.Module) -> None:
    """Give a module parameters and buffers on the GPU."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(to_fake(parameter), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = to_fake(buffer)


@contextmanager
def _cuda_device_guard() -> Iterator[None]:
    """Let torch's CPU build index tensors of a GPU: it asks for that one's device guard, and gets that of "meta"."""
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[_CUDA] = guards[_CUDA], guards[_CUDA] or guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = before


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """A GPU for the time inside."""
    mode = FakeCuda()
    with ExitStack() as stack:
        stack.enter_context(patch("torch.cuda.get_device_capability", lambda device=None: CAPABILITY))
        stack.enter_context(patch("torch.cuda.default_stream", lambda device=None: FakeStream()))
        stack.enter_context(patch("torch.cuda.current_stream", lambda device=None: FakeStream()))
        stack.enter_context(patch("torch.cuda.stream", lambda stream: nullcontext()))
        stack.enter_context(patch("torch.cuda.Stream", FakeStream))
        stack.enter_context(patch("torch.cuda.Event", FakeEvent))
        stack.enter_context(patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
        stack.enter_context(_cuda_device_guard())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mode)
        yield mode
