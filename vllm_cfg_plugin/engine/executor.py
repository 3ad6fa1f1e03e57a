"""vLLM's executor interface: one process per cfg rank, driven by step plans over ZMQ.

A ROUTER socket here, a DEALER in every rank. Plans are sent as soon as they are made and ranks take them in order, so a
rank finds the next one waiting. The engine's thread is the only one that touches the socket: a future's `result()`
pumps it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.process import BaseProcess
from typing import Any

import cloudpickle
import zmq
from vllm.logger import init_logger
from vllm.utils.network_utils import get_distributed_init_method, get_loopback_ip, get_open_port
from vllm.utils.system_utils import get_mp_context
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.abstract import Executor, FailureCallback

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.engine import plan as wire
from vllm_cfg_plugin.engine.step_result import StepResult, merge_reports
from vllm_cfg_plugin.errors import ConfigurationError, RankDiedError
from vllm_cfg_plugin.pipelines.registry import family_of
from vllm_cfg_plugin.worker import channel
from vllm_cfg_plugin.worker.lifeline import die_with_parent
from vllm_cfg_plugin.worker.process import run_worker

logger = init_logger(__name__)

_SHUTDOWN_SECONDS = 5.0


class CfgExecutor(Executor):
    """Runs step plans on `world_size` worker processes of this machine."""

    def _init_executor(self) -> None:
        self._failure_callback: FailureCallback | None = None
        self._closing = threading.Event()
        self._processes: list[BaseProcess] = []
        self._pending: dict[tuple[bytes, int], _Pending] = {}
        self._rpc_ids = 0
        self._finalizer = weakref.finalize(self, _close, self._closing, self._processes)
        if multiprocessing.parent_process() is not None:
            # The API server started this process. Without this, killing it with -9 would leave the engine behind.
            die_with_parent()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        address = f"ipc://@vllm-cfg-{os.getpid()}-{uuid.uuid4().hex}"
        self._socket.bind(address)
        try:
            self._start_workers(address)
            self._wait_until_ready()
        except BaseException:
            self.shutdown()
            raise
        threading.Thread(
            target=_watch,
            args=(weakref.ref(self), list(self._processes), self._closing),
            daemon=True,
            name="cfg-rank-monitor",
        ).start()

    def _start_workers(self, address: str) -> None:
        context = self._process_context()
        init_method = get_distributed_init_method(get_loopback_ip(), get_open_port())
        for rank in range(self.parallel_config.world_size):
            process = context.Process(
                target=run_worker,
                args=(self.vllm_config, rank, address, init_method),
                name=f"cfg-rank-{rank}",
                daemon=True,
            )
            process.start()
            self._processes.append(process)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        for process in self._processes:
            self._poller.register(process.sentinel, zmq.POLLIN)

    def _process_context(self) -> Any:
        """Fork on a CPU, where it saves every rank the imports; elsewhere vLLM's choice, as CUDA does not survive one."""
        if self.device_config.device_type != "cpu":
            return get_mp_context()
        implementation = family_of(Checkpoint(self.model_config.model, self.model_config.revision)).implementation
        importlib.import_module(implementation.partition(":")[0])
        return multiprocessing.get_context("fork")

    def _wait_until_ready(self) -> None:
        waiting = set(range(len(self._processes)))
        while waiting:
            rank, (kind, payload, *_) = self._receive()
            if kind == channel.FAILED:
                raise ConfigurationError(f"cfg rank {rank} could not start: {bytes(payload).decode()}")
            waiting.discard(rank)

    # ---- steps ----

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Send the plan to every rank; the future's result is the merged `StepResult`."""
        plan = getattr(scheduler_output, "plan", None)
        if plan is None or plan.is_empty():
            future: Future[Any] = Future()
            future.set_result(StepResult())
        else:
            payload = wire.encode(plan)
            future = self._send_to_all(channel.PLAN, plan.step, payload, _merge_step)
        return future if non_block else future.result()

    # ---- calls of worker methods ----

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        **_: Any,
    ) -> Any:
        """Call a worker method by name, or a function with the worker as its first argument, on every rank."""
        self._rpc_ids += 1
        payload = cloudpickle.dumps((self._rpc_ids, method, args, kwargs or {}))
        future = self._send_to_all(channel.CALL, self._rpc_ids, payload, _merge_call)
        return future if non_block else future.result(timeout)

    # ---- transport ----

    def _send_to_all(self, kind: bytes, number: int, payload: bytes, merge: Callable[[list[Any]], Any]) -> _Pending:
        pending = _Pending(self, len(self._processes), merge)
        self._pending[kind, number] = pending
        for rank in range(len(self._processes)):
            try:
                self._socket.send_multipart([channel.identity(rank), kind, payload])
            except zmq.ZMQError as error:
                raise RankDiedError(f"cfg rank {rank} can't be reached: {error}; see its log above") from error
        return pending

    def pump(self, timeout: float | None) -> None:
        """Receive one message and complete the future that it belongs to."""
        rank, (kind, payload, *frames) = self._receive(timeout)
        if kind == channel.REPORT:
            report = wire.decode_report(payload)
            self._complete((channel.PLAN, report.step), rank, (report, frames))
        elif kind == channel.ANSWER:
            number, ok, value = cloudpickle.loads(payload)
            self._complete((channel.CALL, number), rank, (ok, value))

    def _complete(self, key: tuple[bytes, int], rank: int, answer: Any) -> None:
        if self._pending[key].add(rank, answer):
            del self._pending[key]

    def _receive(self, timeout: float | None = None) -> tuple[int, list[memoryview | bytes]]:
        """The next message of any rank: its rank and frames; pixels stay in ZMQ's buffers.

        Raises:
            RankDiedError: a rank's process ended.
            TimeoutError: nothing came within `timeout` seconds.
        """
        while True:
            events = dict(self._poller.poll(None if timeout is None else int(timeout * 1000)))
            if self._socket in events:
                sender, kind, payload, *frames = self._socket.recv_multipart(copy=False)
                return channel.rank_of(sender.bytes), [kind.bytes, payload.buffer, *(frame.buffer for frame in frames)]
            if events:
                self.check_health()
            elif timeout is not None:
                raise TimeoutError(f"no answer from the cfg ranks within {timeout} s")

    # ---- health and end ----

    def check_health(self) -> None:
        """Raises RankDiedError if the process of a rank has ended."""
        for rank, process in enumerate(self._processes):
            if process.exitcode is not None:
                raise RankDiedError(
                    f"the process of cfg rank {rank} (pid {process.pid}) ended with code {process.exitcode}"
                )

    def register_failure_callback(self, callback: FailureCallback) -> None:
        self._failure_callback = callback

    def notify_failure(self) -> None:
        """Tell EngineCore once; called from the monitor thread."""
        callback, self._failure_callback = self._failure_callback, None
        if callback is not None:
            callback()

    def shutdown(self) -> None:
        """Ask the ranks to stop, then make them; safe to call again."""
        if self._finalizer.detach() is None:
            return
        for rank in range(len(self._processes)):
            try:
                self._socket.send_multipart([channel.identity(rank), channel.STOP, b""], zmq.NOBLOCK)
            except zmq.ZMQError:
                continue  # it never connected, or is gone already
        _close(self._closing, self._processes)
        self._context.destroy(linger=0)

    # ---- what EngineCore asks of executors of language models ----

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    @property
    def supported_tasks(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("plugin",)

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        return [{} for _ in self._processes]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["LBNHC"] for _ in self._processes]

    def set_kv_cache_layout(self, layout_name: str) -> None:
        """There is no KV cache."""

    def initialize_from_config(self, kv_cache_configs: Any) -> None:
        """There is no KV cache."""

    def compile_or_warm_up_model(self) -> None:
        """The ranks warm up while they start."""

    def supports_draft_weight_updates(self) -> bool:
        return False

    def reset_mm_cache(self) -> None:
        """There is no multi-modal cache."""


class _Pending(Future[Any]):
    """One message's answers from every rank; its `result()` pumps the executor's socket until they are all there."""

    def __init__(self, executor: CfgExecutor, ranks: int, merge: Callable[[list[Any]], Any]) -> None:
        super().__init__()
        self._executor = executor
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
            self._executor.pump(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return super().result()


def _merge_step(answers: list[Any]) -> StepResult:
    return merge_reports(answers)


def _merge_call(answers: list[tuple[bool, Any]]) -> list[Any]:
    for rank, (ok, value) in enumerate(answers):
        if not ok:
            raise RuntimeError(f"the call failed on cfg rank {rank}: {value}")
    return [value for _, value in answers]


def _watch(executor: weakref.ref[CfgExecutor], processes: list[BaseProcess], closing: threading.Event) -> None:
    """Monitor thread: an idle engine doesn't pump, and must still notice that a rank died."""
    multiprocessing.connection.wait([process.sentinel for process in processes])
    target = executor()
    if closing.is_set() or target is None:
        return
    for rank, process in enumerate(processes):
        if process.exitcode is not None:
            logger.error("The process of cfg rank %d (pid %s) ended with code %s", rank, process.pid, process.exitcode)
    target.notify_failure()


def _close(closing: threading.Event, processes: list[BaseProcess]) -> None:
    closing.set()
    deadline = time.monotonic() + _SHUTDOWN_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
