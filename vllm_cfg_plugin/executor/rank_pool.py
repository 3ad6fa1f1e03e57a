"""The worker processes and the messages to and from them.

A ROUTER socket here, a DEALER in every rank. Messages are sent as soon as they are made and ranks take them in order,
so a rank finds its next plan waiting. One thread uses a pool, the engine's: a pending answer's `result()` pumps it.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import zmq
from vllm.utils.network_utils import get_distributed_init_method, get_loopback_ip, get_open_port

from vllm_cfg_plugin.errors import ConfigurationError, RankDiedError
from vllm_cfg_plugin.executor import channel
from vllm_cfg_plugin.executor.process import run_worker
from vllm_cfg_plugin.logs import get_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)

_SHUTDOWN_SECONDS = 5.0

Frames = list[memoryview | bytes]
# (kind, number) of the message that was answered, and one rank's answer.
ReadAnswer = Callable[[bytes, Frames], tuple[tuple[bytes, int], Any]]


class RankPool:
    """`ranks` running worker processes.

    Args:
        context: multiprocessing context that makes the processes.
        read_answer: what a rank's message answers.

    Attributes:
        side_messages: the frames of messages that answer nothing, for the owner to take.

    Raises:
        ConfigurationError: a rank could not start; says why.
    """

    def __init__(self, vllm_config: VllmConfig, ranks: int, context: Any, read_answer: ReadAnswer) -> None:
        self._read_answer = read_answer
        self._pending: dict[tuple[bytes, int], PendingAnswer] = {}
        self.side_messages: list[Frames] = []
        self._closing = threading.Event()
        self._processes: list[BaseProcess] = []
        # Also when the engine ends without calling close().
        self._finalizer = weakref.finalize(self, _end_processes, self._closing, self._processes)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._poller = zmq.Poller()
        try:
            self._start(vllm_config, ranks, context)
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._processes)

    @property
    def has_pending(self) -> bool:
        """Whether the ranks still owe an answer."""
        return bool(self._pending)

    def _start(self, vllm_config: VllmConfig, ranks: int, context: Any) -> None:
        address = f"ipc://@vllm-cfg-{os.getpid()}-{uuid.uuid4().hex}"  # abstract: leaves no file behind
        self._socket.bind(address)
        self._poller.register(self._socket, zmq.POLLIN)
        init_method = get_distributed_init_method(get_loopback_ip(), get_open_port())
        for rank in range(ranks):
            process = context.Process(
                target=run_worker, args=(vllm_config, rank, address, init_method), name=f"cfg-rank-{rank}", daemon=True
            )
            process.start()
            self._processes.append(process)
            self._poller.register(process.sentinel, zmq.POLLIN)

    def _wait_until_ready(self) -> None:
        waiting = set(range(len(self._processes)))
        while waiting:
            rank, (kind, payload, *_) = self._receive(None)
            if kind == channel.FAILED:
                raise ConfigurationError(f"cfg rank {rank} could not start: {bytes(payload).decode()}")
            waiting.discard(rank)

    def send_to_all(self, kind: bytes, number: int, payload: bytes, merge: Callable[[list[Any]], Any]) -> PendingAnswer:
        """Send one message to every rank; the result is `merge` of their answers in rank order.

        Raises:
            RankDiedError: a rank can't be reached.
        """
        pending = self._pending[kind, number] = PendingAnswer(self, len(self._processes), merge)
        for rank in range(len(self._processes)):
            try:
                self._socket.send_multipart([channel.identity(rank), kind, payload])
            except zmq.ZMQError as error:
                raise RankDiedError(f"cfg rank {rank} can't be reached: {error}; see its log above") from error
        return pending

    def pump(self, timeout: float | None) -> None:
        """Receive one message and hand it to the answer that waits for it; see `_receive` for the errors."""
        rank, (kind, *frames) = self._receive(timeout)
        if kind == channel.SIDE:
            self.side_messages.append(frames)
            return
        key, answer = self._read_answer(bytes(kind), frames)
        if self._pending[key].add(rank, answer):
            del self._pending[key]

    def _receive(self, timeout: float | None) -> tuple[int, Frames]:
        """The next message of any rank: its rank and frames; pixels stay in ZMQ's buffers.

        Raises:
            RankDiedError: a rank's process ended.
            TimeoutError: nothing came within `timeout` seconds.
        """
        while True:
            events = dict(self._poller.poll(None if timeout is None else int(timeout * 1000)))
            if self._socket in events:
                sender, kind, *frames = self._socket.recv_multipart(copy=False)
                return channel.rank_of(sender.bytes), [kind.bytes, *(frame.buffer for frame in frames)]
            if events:
                self.check_health()
            elif timeout is not None:
                raise TimeoutError(f"no answer from the cfg ranks within {timeout} s")

    def check_health(self) -> None:
        """Raises RankDiedError if the process of a rank has ended."""
        for rank, process in enumerate(self._processes):
            if process.exitcode is not None:
                raise RankDiedError(
                    f"the process of cfg rank {rank} (pid {process.pid}) ended with code {process.exitcode}"
                )

    def watch(self, on_death: Callable[[], None]) -> None:
        """Call `on_death` from a thread when a rank dies: an idle engine doesn't pump, and must still notice."""
        threading.Thread(
            target=_watch, args=(list(self._processes), self._closing, on_death), daemon=True, name="cfg-rank-monitor"
        ).start()

    def close(self) -> None:
        """Ask the ranks to stop, then make them; safe to call again."""
        if self._finalizer.detach() is None:
            return
        for rank in range(len(self._processes)):
            try:
                self._socket.send_multipart([channel.identity(rank), channel.STOP, b""], zmq.NOBLOCK)
            except zmq.ZMQError:
                continue  # it never connected, or is gone already
        _end_processes(self._closing, self._processes)
        self._context.destroy(linger=0)


class PendingAnswer(Future[Any]):
    """One message's answers from every rank; its `result()` pumps the pool's socket until they are all there."""

    def __init__(self, pool: RankPool, ranks: int, merge: Callable[[list[Any]], Any]) -> None:
        super().__init__()
        self._pool = pool
        self._answers: dict[int, Any] = {}
        self._ranks = ranks
        self._merge = merge

    def add(self, rank: int, answer: Any) -> bool:
        """Store one rank's answer; True when it was the last."""
        self._answers[rank] = answer
        if len(self._answers) < self._ranks:
            return False
        try:
            self.set_result(self._merge([self._answers[rank] for rank in range(self._ranks)]))
        except Exception as error:
            self.set_exception(error)
        return True

    def result(self, timeout: float | None = None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done():
            self._pool.pump(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return super().result()


def _watch(processes: list[BaseProcess], closing: threading.Event, on_death: Callable[[], None]) -> None:
    ended = multiprocessing.connection.wait([process.sentinel for process in processes])
    if closing.is_set():
        return
    for rank, process in enumerate(processes):
        if process.sentinel in ended:
            process.join()  # its exit code comes a moment after its sentinel
            logger.error("The process of cfg rank %d (pid %s) ended with code %s", rank, process.pid, process.exitcode)
    on_death()


def _end_processes(closing: threading.Event, processes: list[BaseProcess]) -> None:
    closing.set()
    deadline = time.monotonic() + _SHUTDOWN_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
