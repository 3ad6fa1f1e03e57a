"""The running ranks of one start, and the messages to and from them.

A ROUTER socket here, a DEALER in every rank. Messages are sent as soon as they are made and ranks take them in order,
so a rank finds its next plan waiting. One thread at a time uses a pool: a pending answer's `result()` pumps it.
"""

from __future__ import annotations

import math
import os
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any

import zmq
from vllm.utils.network_utils import get_distributed_init_method, get_loopback_ip, get_open_port

from vllm_cfg_plugin.errors import ConfigurationError, RankDiedError
from vllm_cfg_plugin.executor import channel
from vllm_cfg_plugin.executor.rank_processes import Meeting, StartRanks

_SHUTDOWN_SECONDS = 5.0
_LONGEST_POLL_MS = 2**31 - 1  # 25 days

Frames = list[memoryview | bytes]
# (kind, number) of the message that was answered, and one rank's answer.
ReadAnswer = Callable[[bytes, Frames], tuple[tuple[bytes, int], Any]]


class RankPool:
    """Running worker processes, one of each name.

    Args:
        start_ranks: makes the processes.
        names: what users know the ranks by, see `Meeting`.
        read_answer: what a rank's message answers.
        answer_seconds: ranks that owe an answer to a plan and send nothing for so long count as dead; called when the
            first plan is sent.

    Attributes:
        processes: of the ranks.
        side_messages: the frames of messages that answer nothing, for the owner to take.
        heard: `time.monotonic()` of the last message.

    Raises:
        ConfigurationError: a rank could not start; says why.
        RankDiedError: the process of a rank ended while it started.
    """

    def __init__(
        self,
        start_ranks: StartRanks,
        names: Sequence[str],
        read_answer: ReadAnswer,
        answer_seconds: Callable[[], float],
    ) -> None:
        self.names = names
        self._read_answer = read_answer
        self._find_answer_seconds = answer_seconds
        self._pending: dict[tuple[bytes, int], PendingAnswer] = {}
        self.side_messages: list[Frames] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        address = f"ipc://@vllm-cfg-{os.getpid()}-{uuid.uuid4().hex}"  # abstract: leaves no file behind
        self._socket.bind(address)
        init_method = get_distributed_init_method(get_loopback_ip(), get_open_port())
        try:
            self.processes = start_ranks(Meeting(names, address, init_method))
        except BaseException:
            self._context.destroy(linger=0)
            raise
        # Also when the engine ends without calling close().
        self._finalizer = weakref.finalize(self, self.processes.end, _SHUTDOWN_SECONDS)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        for sentinel in self.processes.sentinels:
            self._poller.register(sentinel, zmq.POLLIN)
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise
        self.heard = time.monotonic()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_pending(self) -> bool:
        """Whether the ranks still owe an answer."""
        return bool(self._pending)

    def _wait_until_ready(self) -> None:
        waiting = set(range(len(self)))
        while waiting:
            rank, (kind, payload, *_) = self._receive(None)
            if kind == channel.FAILED:
                raise ConfigurationError(f"cfg rank {self.names[rank]} could not start: {bytes(payload).decode()}")
            waiting.discard(rank)

    def send_to_all(self, kind: bytes, number: int, payload: bytes, merge: Callable[[list[Any]], Any]) -> PendingAnswer:
        """Send one message to every rank; the result is `merge` of their answers in rank order.

        Raises:
            RankDiedError: a rank can't be reached.
        """
        if not self._pending:
            self.heard = time.monotonic()  # nothing was due until now
        pending = self._pending[kind, number] = PendingAnswer(self, kind, merge)
        for rank in range(len(self)):
            try:
                self._socket.send_multipart([channel.identity(rank), kind, payload])
            except zmq.ZMQError as error:
                raise RankDiedError(
                    f"cfg rank {self.names[rank]} can't be reached: {error}; see its log above"
                ) from error
        return pending

    def pump(self, timeout: float | None) -> None:
        """Receive one message and hand it to the answer that waits for it; see `_receive` for the errors."""
        rank, (kind, *frames) = self._receive(timeout)
        self.heard = time.monotonic()
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
            events = dict(self._poller.poll(None if timeout is None else min(int(timeout * 1000), _LONGEST_POLL_MS)))
            if self._socket in events:
                sender, kind, *frames = self._socket.recv_multipart(copy=False)
                return channel.rank_of(sender.bytes), [kind.bytes, *(frame.buffer for frame in frames)]
            if events:
                self.check_health()
            elif timeout is not None:
                raise TimeoutError(f"no answer from the cfg ranks within {timeout} s")

    @cached_property
    def _answer_seconds(self) -> float:
        return self._find_answer_seconds()

    def check_silence(self) -> None:
        """Have ranks that have said nothing for long say that they live; what is due may just take its time.

        Raises:
            RankDiedError: one of them does not.
        """
        if time.monotonic() - self.heard > self._answer_seconds:
            self.send_to_all(channel.PING, 0, b"", list).result()

    def wait_for_answer(self, deadline: float | None, is_prompt: bool) -> None:
        """Pump once, for an answer that is due.

        Args:
            deadline: of the caller, `time.monotonic()`.
            is_prompt: ranks that send nothing for `answer_seconds` hang.

        Raises:
            RankDiedError: a rank's process ended, or no rank has sent anything for `answer_seconds`.
            TimeoutError: the deadline has passed.
        """
        silent_at = self.heard + self._answer_seconds if is_prompt else math.inf
        until = silent_at if deadline is None else min(silent_at, deadline)
        try:
            self.pump(None if until == math.inf else max(0.0, until - time.monotonic()))
        except TimeoutError as error:
            if until != silent_at:
                raise
            raise RankDiedError(
                f"the cfg ranks owe an answer and have sent nothing for {self._answer_seconds:g} s "
                "(--cfg-step-timeout): one of them hangs"
            ) from error

    def check_health(self) -> None:
        """Raises RankDiedError if the process of a rank has ended."""
        if ended := self.processes.why_ended():
            raise RankDiedError(ended)

    def close(self) -> None:
        """Ask the ranks to stop, then make them; safe to call again."""
        if self._finalizer.alive:
            for rank in range(len(self)):
                try:
                    self._socket.send_multipart([channel.identity(rank), channel.STOP, b""], zmq.NOBLOCK)
                except zmq.ZMQError:
                    continue  # it never connected, or is gone already
            self._end(_SHUTDOWN_SECONDS)

    def kill(self) -> None:
        """End the ranks at once; safe to call again."""
        if self._finalizer.alive:
            self._end(0.0)

    def _end(self, grace: float) -> None:
        self._finalizer.detach()
        self.processes.end(grace)
        self._context.destroy(linger=0)


class PendingAnswer(Future[Any]):
    """One message's answers from every rank; its `result()` pumps the pool's socket until they are all there."""

    def __init__(self, pool: RankPool, kind: bytes, merge: Callable[[list[Any]], Any]) -> None:
        super().__init__()
        self._pool = pool
        self._answers: dict[int, Any] = {}
        self._is_prompt = kind != channel.CALL  # a method may take as long as it takes
        self._merge = merge

    def add(self, rank: int, answer: Any) -> bool:
        """Store one rank's answer; True when it was the last."""
        self._answers[rank] = answer
        if len(self._answers) < len(self._pool):
            return False
        try:
            self.set_result(self._merge([self._answers[rank] for rank in range(len(self._pool))]))
        except Exception as error:
            self.set_exception(error)
        return True

    def result(self, timeout: float | None = None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done():
            self._pool.wait_for_answer(deadline, self._is_prompt)
        return super().result()
