"""Calls of a denoiser, cut into parts that ranks can forward apart; must not import vLLM.

Pipelines with guidance call their denoiser several times in a row, or once with a batch that has the branches end to
end. A call of the first kind is one part. One of the second kind is cut along its batch, on one rank too: an image is
then the same on any number of ranks.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from vllm_cfg_plugin.logs import get_logger

logger = get_logger(__name__)

_MOST_BRANCHES = 4  # a larger batch is halved: it has more than a row for each branch

_current = threading.local()


class Caller(Protocol):
    """A thread's pipeline call, whose calls of denoisers are answered later."""

    def answer(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the denoiser returns to the pipeline: tensors that are filled before anything reads them."""


def enter(caller: Caller) -> None:
    """From now on this thread's calls of denoisers are the caller's to answer."""
    _current.caller = caller


def current_caller() -> Any:
    """This thread's; None in a thread without one."""
    return getattr(_current, "caller", None)


@dataclass(frozen=True)
class Part:
    """What one forward can do of a call.

    Attributes:
        forward: the denoiser's own.
        targets: where the tensors that it returns belong: views of what the pipeline was given.
    """

    forward: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    targets: Sequence[torch.Tensor]

    @property
    def size(self) -> int:
        """Elements of all targets."""
        return sum(target.numel() for target in self.targets)

    def predict(self) -> torch.Tensor:
        """Forward; everything that came out, float32 [size]."""
        outputs = _tensors(self.forward(*self.args, **self.kwargs))
        return torch.cat([output.reshape(-1).float() for output in outputs])

    def fill(self, prediction: torch.Tensor) -> None:
        """Put a prediction, [size], where it belongs."""
        sizes = [target.numel() for target in self.targets]
        for target, flat in zip(self.targets, prediction.split(sizes), strict=True):
            target.copy_(flat.view_as(target))


@dataclass(frozen=True)
class _Kind:
    """What calls with arguments of the same names, shapes and types have in common.

    Attributes:
        branches: equal parts of their batch that are forwarded apart.
        is_list: they return a list with a tensor for each of the batch.
        leaves, spec: of what they return; of a tensor one without data.
    """

    branches: int
    is_list: bool
    leaves: tuple[Any, ...]
    spec: TreeSpec


@dataclass(frozen=True)
class Call:
    """A call of a denoiser.

    Attributes:
        answer: what the pipeline gets, its tensors still to be filled.
        parts: that fill them.
    """

    answer: Any
    parts: list[Part]


@dataclass
class Denoiser:
    """A model that predicts noise. In a thread with a caller its calls are that one's to answer.

    Attributes:
        name: of the pipeline's component.
    """

    name: str
    module: torch.nn.Module
    _kinds: dict[Hashable, _Kind] = field(default_factory=dict)
    _has_warned: bool = False

    def __post_init__(self) -> None:
        self._plain = plain = self.module.forward

        @functools.wraps(plain)  # some pipelines look at its signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            caller = current_caller()
            return plain(*args, **kwargs) if caller is None else caller.answer(self, args, kwargs)

        self.module.forward = forward

    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call with these arguments; the first one of its kind is forwarded here, to see what that returns."""
        key = _kind_of((args, kwargs))
        if key not in self._kinds:
            self._kinds[key] = self._look(args, kwargs)
        kind = self._kinds[key]
        leaves = [torch.empty_like(leaf, device=self._device) if _is_tensor(leaf) else leaf for leaf in kind.leaves]
        tensors = [leaf for leaf in leaves if _is_tensor(leaf)]
        parts = []
        for index in range(kind.branches):
            part_args, part_kwargs = (args, kwargs)
            if kind.branches > 1:
                part_args, part_kwargs = _share((args, kwargs), _batch(tensors, kind.is_list), index, kind.branches)
            targets = _targets(tensors, kind.is_list, index, kind.branches)
            parts.append(Part(self._plain, part_args, part_kwargs, targets))
        return Call(tree_unflatten(leaves, kind.spec), parts)

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Kind:
        whole = self._plain(*args, **kwargs)
        leaves, spec = tree_flatten(whole)
        is_list = type(whole[0]) is list  # as of a tuple so of diffusers' outputs
        branches = _branches(_tensors(whole), is_list)
        if branches > 1 and not self._can_be_cut(args, kwargs, _tensors(whole), is_list, branches):
            if not self._has_warned:
                logger.warning(
                    "A call of %s can't be cut into its %d branches: such calls are forwarded whole, by one rank",
                    self.name,
                    branches,
                )
            self._has_warned = True
            branches = 1
        meta = tuple(leaf.to("meta") if _is_tensor(leaf) else leaf for leaf in leaves)
        return _Kind(branches, is_list, meta, spec)

    def _can_be_cut(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        whole: list[torch.Tensor],
        is_list: bool,
        branches: int,
    ) -> bool:
        """Whether the branches by themselves come out as they do in one batch: they might see each other there."""
        batch = _batch(whole, is_list)
        try:
            for index in range(branches):
                part_args, part_kwargs = _share((args, kwargs), batch, index, branches)
                outputs = _tensors(self._plain(*part_args, **part_kwargs))
                expected = _targets(whole, is_list, index, branches)
                if len(outputs) != len(expected) or not all(map(_is_near, outputs, expected)):
                    return False
        except Exception as error:  # of a model whose arguments were cut in a wrong way: anything
            logger.debug("A part of a call of %s failed", self.name, exc_info=error)
            return False
        return True


def _batch(outputs: Sequence[torch.Tensor], is_list: bool) -> int:
    """Of a call that returns these."""
    return len(outputs) if is_list else outputs[0].shape[0]


def _targets(outputs: Sequence[torch.Tensor], is_list: bool, index: int, branches: int) -> list[torch.Tensor]:
    """What of these one branch's forward returns."""
    if is_list:
        size = len(outputs) // branches
        return [*outputs[index * size : (index + 1) * size]]
    return [_rows(output, 0, index, branches) for output in outputs]


def _branches(outputs: Sequence[torch.Tensor], is_list: bool) -> int:
    """Into how many parts the batch of a call may be cut that returns these."""
    if not is_list and len({output.shape[:1] for output in outputs}) != 1:
        return 1
    batch = _batch(outputs, is_list) if is_list or outputs[0].dim() else 1
    if batch <= _MOST_BRANCHES:
        return max(batch, 1)
    return 2 if batch % 2 == 0 else 1


def _share(value: Any, batch: int, index: int, branches: int) -> Any:
    """Of everything that has a row for each of the batch, the rows of one branch."""
    if _is_tensor(value):
        # Texts for each layer of a model have the layers first (HiDream).
        dim = next((dim for dim in range(min(value.dim(), 2)) if value.shape[dim] == batch), None)
        return value if dim is None else _rows(value, dim, index, branches)
    if isinstance(value, dict):
        return {name: _share(item, batch, index, branches) for name, item in value.items()}
    if type(value) is list and len(value) == batch and all(_is_tensor(item) for item in value):
        size = batch // branches
        return value[index * size : (index + 1) * size]
    if type(value) in (list, tuple):
        return type(value)(_share(item, batch, index, branches) for item in value)
    return value


def _rows(tensor: torch.Tensor, dim: int, index: int, branches: int) -> torch.Tensor:
    size = tensor.shape[dim] // branches
    return tensor.narrow(dim, index * size, size)


def _is_near(output: torch.Tensor, expected: torch.Tensor) -> bool:
    if output.shape != expected.shape:
        return False
    largest = expected.abs().max().item()
    return (output - expected).abs().max().item() <= torch.finfo(expected.dtype).eps ** 0.5 * largest


def _kind_of(value: Any) -> Hashable:
    """Equal for arguments that a model treats alike but for the numbers in their tensors."""
    if _is_tensor(value):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return tuple((name, _kind_of(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value).__name__, *map(_kind_of, value)
    return value if value is None or isinstance(value, (bool, int, str)) else type(value).__name__


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if _is_tensor(leaf)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
