"""The processes of one start of an engine's ranks; must not import torch."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_cfg_plugin.executor.process import run_worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Meeting(NamedTuple):
    """Where ranks of one start find the engine and each other.

    Attributes:
        names: of the ranks, "0", "1", ...; where a cfg rank is several processes "0.0", "0.1", ...
        address: of the engine's ZMQ socket.
        init_method: of torch.distributed.
    """

    names: Sequence[str]
    address: str
    init_method: str


class RankProcesses(ABC):
    """The processes of one start: they run until `end`, or until something else ends them."""

    @property
    @abstractmethod
    def sentinels(self) -> list[Any]:
        """What `multiprocessing.connection.wait` and a ZMQ poller take: ready when a process may have ended."""

    @abstractmethod
    def why_ended(self) -> str:
        """Which process has ended by itself, and how; '' while all run."""

    @abstractmethod
    def end(self, grace: float) -> None:
        """Wait `grace` seconds for the processes to end by themselves, then kill them; safe to call again."""


StartRanks = Callable[[Meeting], RankProcesses]


class OwnProcesses(RankProcesses):
    """Children of this process.

    Args:
        context: multiprocessing context that makes them.
        is_template: this process is the one that does nothing but fork ranks.
    """

    def __init__(self, vllm_config: VllmConfig, context: Any, meeting: Meeting, *, is_template: bool = False) -> None:
        self._processes: list[BaseProcess] = []
        self._names = meeting.names
        for rank, rank_name in enumerate(meeting.names):
            process = context.Process(
                target=run_worker,
                args=(vllm_config, rank, rank_name, meeting.address, meeting.init_method, is_template),
                name=f"cfg-rank-{rank_name}",
                daemon=True,
            )
            process.start()
            self._processes.append(process)

    @property
    def pids(self) -> list[int | None]:
        return [process.pid for process in self._processes]

    @property
    def sentinels(self) -> list[Any]:
        return [process.sentinel for process in self._processes]

    def why_ended(self) -> str:
        for name, process in zip(self._names, self._processes, strict=True):
            if process.exitcode is not None:
                return f"the process of cfg rank {name} (pid {process.pid}) ended with code {process.exitcode}"
        return ""

    def end(self, grace: float) -> None:
        end_processes(self._processes, grace)


def end_processes(processes: list[BaseProcess], grace: float) -> None:
    """Wait `grace` seconds in all for processes to end by themselves, then kill them."""
    deadline = time.monotonic() + grace
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
