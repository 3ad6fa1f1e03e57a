"""The thread of one call of a diffusers pipeline, which pauses where it needs the denoiser's predictions.

The thread and the one that drives it take turns. The denoiser's calls return at once, with tensors to be filled; the
thread pauses where the pipeline first reads one of them, and by then has made all calls of the step: they are forwarded
where the engine likes, and the thread goes on with what came out. Must not import vLLM.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache, wraps
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.pipelines.any_pipeline.calls import Denoiser, Part, current_caller, enter

logger = get_logger(__name__)

_LOOK_EVERY_S = 0.05

# What may be asked of a tensor that is still to be filled.
_ABOUT_SHAPE = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.__len__,
}
# What may only look at such a tensor in another way; whether it does is seen by the memory of what it returns.
_VIEWS = {
    *("__getitem__", "chunk", "split", "narrow", "select", "unbind", "view", "reshape", "flatten", "unflatten"),
    *("squeeze", "unsqueeze", "transpose", "permute", "movedim", "contiguous", "detach", "to", "float"),
}
_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"))}


class _Stage(Enum):
    """What a thread waits for."""

    PREDICTIONS = 1
    DECODE = 2
    NOTHING = 3  # it has ended


class _Closed(BaseException):
    """Ends a thread that nobody needs; no `Exception`, so that no pipeline takes it for a failure of its own."""


class CallThread:
    """The thread of one call; see `PipelineRun` for the arguments."""

    def __init__(
        self, make_own: Callable[[], Any], arguments: Mapping[str, Any], steps: int, device: torch.device
    ) -> None:
        self.device = device
        self.latents = torch.zeros(1)
        self.parts: list[Part] = []
        self.result: Any = None
        self._make_own, self._arguments, self._steps = make_own, arguments, steps
        self._own: Any = None
        self._steps_taken = 0
        self._has_asked = False  # for the predictions of the step that it is in
        self._stage = _Stage.PREDICTIONS
        self._error: BaseException | None = None
        self._is_closed = False
        self._storages: set[int] = set()  # of the tensors that the parts will read
        self._pending: dict[int, torch.Tensor] = {}  # tensors to be filled, and views of them, by their ids
        self._turn, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._stream: Any = None  # that it runs on
        self._streams: set[Any] = set()  # that it has run on

    # ---- called by whoever drives it ----

    @property
    def is_predicting(self) -> bool:
        return self._stage is _Stage.PREDICTIONS

    @property
    def has_ended(self) -> bool:
        return self._stage is _Stage.NOTHING

    def fill(self, parts: Sequence[Part]) -> None:
        """Run these calls on this rank; afterwards every part is there."""
        for part in parts:
            part.fill(part.predict())
        self.parts = []
        self._storages.clear()
        self._pending.clear()

    def resume(self) -> None:
        """Let it run until it pauses; raises what the pipeline raised."""
        if self.device.type == "cuda":
            self._stream = torch.cuda.current_stream(self.device)
            self._streams.add(self._stream)
        if self._thread is None:
            # It inherits this thread's priority: that of an encode.
            self._thread = threading.Thread(target=self._run, name="cfg-pipeline-call", daemon=True)
            self._thread.start()
        self._turn.release()
        while not self._paused.acquire(timeout=_LOOK_EVERY_S):
            self.latents.dim()  # a torch function, in which cancelled side work ends
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End it at its next torch function; called when nobody drives it any more."""
        self._is_closed = True
        # It frees what was made on any of its streams, and what is queued on the last one may still read that.
        for stream in self._streams - {self._stream}:
            stream.wait_stream(self._stream)
        self._turn.release()

    # ---- the thread itself ----

    def _run(self) -> None:
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # as in every thread of a rank
        enter(self)
        try:
            self._wait_for_turn()
            with torch.inference_mode(), _Watch(self):
                self._own = self._make_own()
                self.result = self._own(**self._arguments)
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        self._stage = _Stage.NOTHING
        self.parts = []
        self._paused.release()

    def _pause(self, stage: _Stage) -> None:
        self._stage = stage
        self._paused.release()
        self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        self._turn.acquire()
        self._end_if_closed()
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)

    def _end_if_closed(self) -> None:
        if self._is_closed:
            raise _Closed

    def answer(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a denoiser returns to the pipeline."""
        if self._reads_predictions(args, kwargs):
            self.settle()
        call = denoiser.cut(args, kwargs)
        self.parts += call.parts
        for part in call.parts:
            self._storages |= _storages((part.args, part.kwargs))
        self._pending |= {id(tensor): tensor for tensor in _walk(call.answer)}
        return call.answer

    def torch_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The pipeline calls a torch function."""
        self._end_if_closed()
        if self.parts and func not in _ABOUT_SHAPE:
            if self._reads_predictions(args, kwargs):
                if getattr(func, "__name__", "") in _VIEWS and self._is_view(views := func(*args, **kwargs)):
                    return views
                self.settle()
            elif _is_in_place(func) and not self._storages.isdisjoint(_storages(args[:1])):
                self.settle()
        return func(*args, **kwargs)

    def _reads_predictions(self, args: Any, kwargs: Any) -> bool:
        return any(id(tensor) in self._pending for tensor in _walk((args, kwargs)))

    def _is_view(self, tensors: Any) -> bool:
        """Whether all these are views of tensors that are to be filled; then they are to be filled too."""
        if not _storages(tensors) <= _storages([*self._pending.values()]):
            return False
        self._pending |= {id(tensor): tensor for tensor in _walk(tensors)}
        return True

    def settle(self) -> None:
        """Wait until all that the denoisers were asked is answered."""
        if not self.parts:
            return
        if self._has_asked:
            _warn_of_dependence()
            self.fill(self.parts)
            return
        self._has_asked = True
        self._pause(_Stage.PREDICTIONS)

    def note_step(self, stepped: Any) -> None:
        """The noise scheduler has taken a step."""
        latents = stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample
        self.latents = latents
        if not self._has_asked:
            return
        self._has_asked = False
        self._steps_taken += 1
        # Most pipelines say how many they take, some of them fewer than they were asked for (`strength`).
        if self._steps_taken == min(self._steps, getattr(self._own, "_num_timesteps", None) or self._steps):
            self._pause(_Stage.DECODE)


class _Watch(TorchFunctionMode):
    """Within it a pipeline's call reads no prediction before it is there, and ends when it is closed."""

    def __init__(self, thread: CallThread) -> None:
        super().__init__()
        self._thread = thread

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._thread.torch_function(func, args, kwargs or {})


@cache
def watched(scheduler: type) -> type:
    """The class of a noise scheduler, whose steps a call's thread notes; a copy of one is of the same class."""
    plain: Any = scheduler

    class Watched(plain):  # type: ignore[misc]
        @wraps(plain.step)  # pipelines look at its signature
        def step(self, *args: Any, **kwargs: Any) -> Any:
            thread = current_caller()
            if thread is None:
                return super().step(*args, **kwargs)
            thread.settle()
            stepped = super().step(*args, **kwargs)
            thread.note_step(stepped)
            return stepped

    Watched.__name__, Watched.__qualname__, Watched.__module__ = plain.__name__, plain.__qualname__, plain.__module__
    return Watched


@cache
def _warn_of_dependence() -> None:
    """Once in a process."""
    logger.warning(
        "In a step of this pipeline a call of the denoiser depends on what another one returned: after the first of "
        "these calls every cfg rank makes the others itself"
    )


def _is_in_place(func: Any) -> bool:
    name: str = getattr(func, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _walk(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk(item)


def _storages(value: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in _walk(value) if tensor.numel()}
