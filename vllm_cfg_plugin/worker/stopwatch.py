"""Times runs on a rank's device within a limit of time; the shortest of a few runs counts.

What else a machine does only ever adds time. Must not import vLLM or diffusers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf

import torch

from vllm_cfg_plugin.distributed.sequence_group import ALONE, MemberFailedError, SequenceGroup
from vllm_cfg_plugin.engine.cost import PackSample
from vllm_cfg_plugin.worker.device_memory import DeviceMemory

LONGEST_RUN_SECONDS = 0.25  # inputs stop growing where a run would take longer
ALL_RUNS_SECONDS = 2.0  # all runs together, by the clock that they are timed with
BUSY_MACHINE_SECONDS = 3.0  # and on the wall, where others take the core meanwhile
MOST_REPEATS = 6


@dataclass
class Run:
    """Something that is timed again and again.

    Attributes:
        action: what is timed.
        lengths: the size of what it encodes, decodes or forwards: tokens, of a text to encode characters.
        us: its shortest time so far, in microseconds.
        nbytes: most memory that it took; 0 on a CPU.
    """

    action: Callable[[], object]
    lengths: tuple[int, ...]
    us: float = inf
    nbytes: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def sample(self) -> PackSample:
        return PackSample(self.lengths, self.us)


class Stopwatch:
    """Times runs on a device, within limits of time.

    Args:
        group: the ranks that run them together; what counts is the slowest one's time, so all of them go on alike.
        memory: of the device, where that counts too.
    """

    def __init__(self, device: torch.device, group: SequenceGroup = ALONE, memory: DeviceMemory | None = None) -> None:
        self._device = device
        self._group = group
        self._memory = memory
        # One thread's own time leaves out what other processes took of its core. In a group it waits for the others.
        one_thread = device.type == "cpu" and torch.get_num_threads() == 1 and group.size == 1
        self._clock = time.thread_time if one_thread else time.perf_counter
        self._spent = 0.0  # seconds by that clock
        self._waited = 0.0  # seconds on the wall
        self._runs: list[Run] = []

    def climb(
        self,
        runs: Iterable[Run],
        timed: Sequence[Run] = (),
        enough: Callable[[Sequence[Run]], bool] = lambda timed: False,
    ) -> list[Run]:
        """Time runs of growing size until the next would take too long or `enough` says so.

        Args:
            timed: smaller runs that are timed already. Without any, the first of `runs` is timed however long it takes.

        Returns:
            All timed runs.
        """
        climbed = list(timed)
        for run in runs:
            if climbed and (enough(climbed) or not self._allows(climbed[-1], run)):
                break
            try:
                self._time_first(run)
            except (torch.OutOfMemoryError, MemberFailedError):
                if not climbed:
                    raise
                break
            climbed.append(run)
            self._runs.append(run)
        return climbed

    def repeat_all(self) -> None:
        """Time everything again while there is time, short runs first and in turn, so that a disturbance is shared."""
        for _ in range(MOST_REPEATS):
            for run in sorted(self._runs, key=lambda run: run.us):
                if self._has_time_for(run.us / 1e6):
                    self._time(run)

    def _allows(self, last: Run, run: Run) -> bool:
        expected = last.us / 1e6 * run.tokens / last.tokens
        return expected <= LONGEST_RUN_SECONDS and self._has_time_for(2 * expected)

    def _has_time_for(self, seconds: float) -> bool:
        return self._spent + seconds <= ALL_RUNS_SECONDS and self._waited + seconds <= BUSY_MACHINE_SECONDS

    def _time_first(self, run: Run) -> None:
        """Time a run twice, because the first time loads kernels and fills caches; on a slow CPU that one must do."""
        if self._device.type != "cpu":
            run.action()
        self._time(run)
        if self._device.type == "cpu" and run.us / 1e6 <= LONGEST_RUN_SECONDS:
            self._time(run)

    def _time(self, run: Run) -> None:
        self._synchronize()
        if self._memory is not None:
            self._memory.begin()
        wall, began = time.perf_counter(), self._clock()
        run.action()
        self._synchronize()
        times = torch.tensor([[self._clock() - began, time.perf_counter() - wall]], dtype=torch.float64)
        seconds, waited = self._group.all_gather(times).amax(dim=0).tolist()
        if self._memory is not None:
            run.nbytes = max(run.nbytes, self._memory.peak())
        run.us = min(run.us, max(1e6 * seconds, 1.0))
        self._spent += seconds
        self._waited += waited

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
