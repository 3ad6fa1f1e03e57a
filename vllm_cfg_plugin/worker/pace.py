"""How far a rank's stepping thread runs ahead of its device, and when the device got where; must not import vLLM.

On a CPU an operation is done when it returns. An accelerator has a queue of them, and stands idle whenever that is
empty: so the host queues the next step while the device computes this one, reads nothing of it that the device has yet
to compute, and waits only for the step before, which bounds the queue.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

# Of the steps' stream; lower goes first. Side work has the default, 0.
_STEP_PRIORITY = -1


class Mark(Protocol):
    """A place in the queue."""

    def is_reached(self) -> bool:
        """Whether all that was queued before it is done."""

    def wait(self) -> None:
        """Wait for that."""

    def seconds(self) -> float:
        """When that was, on the clock of `time.monotonic()`; only once it is reached."""


class Pace(Protocol):
    """The stepping thread's way of queueing work.

    Attributes:
        steps_ahead: so many steps may be queued behind the one that the device is in.
    """

    steps_ahead: int

    def stepping(self) -> AbstractContextManager[object]:
        """What is queued inside is a part of the steps."""

    def mark(self) -> Mark:
        """The place behind what is queued now."""

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the CPU; to be read when a mark behind it is reached."""

    def hand_over(self, tensor: torch.Tensor) -> None:
        """A tensor that was made on another stream, and is complete, is read by the steps from now on."""


class HostPace:
    """Of a CPU."""

    steps_ahead = 0

    def stepping(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self) -> Mark:
        return _HostMark()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def hand_over(self, tensor: torch.Tensor) -> None:
        """All threads share the memory."""


class _HostMark:
    def __init__(self) -> None:
        self._seconds = time.monotonic()

    def is_reached(self) -> bool:
        return True

    def wait(self) -> None:
        """It is reached."""

    def seconds(self) -> float:
        return self._seconds


class CudaPace:
    """Of a GPU: a stream of its own, which goes before those of the side work."""

    steps_ahead = 1

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=_STEP_PRIORITY)
        # Weights were loaded on the default stream.
        self._stream.wait_stream(torch.cuda.default_stream(device))
        # Events know the time between two of them, so one is held against the host's clock.
        self._origin = torch.cuda.Event(enable_timing=True)
        self._origin.record(self._stream)
        self._origin.synchronize()
        self._origin_seconds = time.monotonic()

    def stepping(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return _CudaMark(event, self._origin, self._origin_seconds)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    def hand_over(self, tensor: torch.Tensor) -> None:
        if tensor.is_cuda:
            tensor.record_stream(self._stream)


class _CudaMark:
    def __init__(self, event: torch.cuda.Event, origin: torch.cuda.Event, origin_seconds: float) -> None:
        self._event = event
        self._origin = origin
        self._origin_seconds = origin_seconds

    def is_reached(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()

    def seconds(self) -> float:
        return self._origin_seconds + 1e-3 * self._origin.elapsed_time(self._event)


def pace_of(device: torch.device) -> Pace:
    """The pace of a device's steps."""
    return CudaPace(device) if device.type == "cuda" else HostPace()
