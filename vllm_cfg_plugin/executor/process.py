"""The main loop of a worker process: start, take plans in order, answer each with a report, stop.

Runs in the child; the executor in the engine's process is the other end of the socket.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch
import zmq

from vllm_cfg_plugin.distributed.sequence_group import GroupBrokenError
from vllm_cfg_plugin.engine import plan as wire
from vllm_cfg_plugin.engine.plan import SideReport, StepReport
from vllm_cfg_plugin.errors import one_line
from vllm_cfg_plugin.executor import channel
from vllm_cfg_plugin.executor.lifeline import die_with_parent, die_with_parents_thread
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.worker.memory import keep_freed_memory
from vllm_cfg_plugin.worker.side_work import end_rank

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerWrapperBase

logger = get_logger(__name__)

_LOOK_MS = 1  # between looks at whether the device is done, where no plan is there that could be begun meanwhile


def run_worker(
    vllm_config: VllmConfig, rank: int, name: str, address: str, init_method: str, is_forked_by_template: bool = False
) -> None:
    """Entry point of the process of `rank`, which users know by `name`; ends the process when told to stop."""
    from vllm_cfg_plugin.compat.forks import release_inherited_listeners, unshare_progress_lock
    from vllm_cfg_plugin.compat.libraries import silence_all_gather_deprecation

    die_with_parent()
    if is_forked_by_template:
        die_with_parents_thread()
    silence_all_gather_deprecation()
    # Ctrl-C reaches the whole process group; the engine decides when the ranks stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The stepping thread must not wait for Python's 5 ms when a side thread has the interpreter.
    sys.setswitchinterval(0.0005)
    release_inherited_listeners()
    unshare_progress_lock()
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, channel.identity(rank))
    socket.connect(address)
    try:
        worker = _start(vllm_config, rank, f"CfgRank{name}", init_method)
    except Exception as error:
        traceback.print_exc()
        socket.send_multipart([channel.FAILED, one_line(error).encode()])
        context.destroy(linger=1000)
        return
    worker.runner.side.deliver = SideReportSender(context, rank, address)
    socket.send_multipart([channel.READY, b""])
    try:
        _serve(worker, rank, socket)
    except GroupBrokenError as error:
        end_rank(error)
    worker.shutdown()
    context.destroy(linger=0)
    sys.stdout.flush()
    sys.stderr.flush()
    # Taking the interpreter apart costs seconds of CPU, which is the time that vLLM gives the whole engine to stop.
    os._exit(0)


class SideReportSender:
    """Sends side reports to the engine from the threads that do the work: a ZMQ socket belongs to one thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], rank: int, address: str) -> None:
        self._context = context
        self._rank = rank
        self._address = address
        self._of_thread = threading.local()

    def __call__(self, report: SideReport, image: torch.Tensor | None) -> None:
        pixels = [] if image is None else [image.numpy().data.cast("B")]
        self._socket().send_multipart([channel.SIDE, wire.encode(report), *pixels], copy=False)

    def _socket(self) -> zmq.Socket[bytes]:
        if not hasattr(self._of_thread, "socket"):
            socket = self._of_thread.socket = self._context.socket(zmq.DEALER)
            name = threading.current_thread().name
            socket.setsockopt(zmq.IDENTITY, channel.identity(self._rank) + f"-{name}".encode())
            socket.connect(self._address)
        return self._of_thread.socket


def _start(vllm_config: VllmConfig, rank: int, title: str, init_method: str) -> WorkerWrapperBase:
    """Create the worker class that the configuration names, with its device and model."""
    from vllm.utils.system_utils import decorate_logs, set_process_title
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    set_process_title(title)
    decorate_logs(title)
    if vllm_config.device_config.device_type == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
    wrapper = WorkerWrapperBase(rpc_rank=rank, global_rank=rank)
    kwargs = {
        "vllm_config": vllm_config,
        "local_rank": rank,
        "rank": rank,
        "distributed_init_method": init_method,
        "is_driver_worker": rank == 0,
    }
    wrapper.init_worker([kwargs] * (rank + 1))
    wrapper.init_device()
    wrapper.load_model()
    if vllm_config.device_config.device_type == "cpu":
        keep_freed_memory()  # only now: loading frees much that no step needs
    return wrapper


def _serve(worker: WorkerWrapperBase, rank: int, socket: zmq.Socket[bytes]) -> None:
    while True:
        while worker.runner.is_ahead and not socket.poll(_LOOK_MS):
            _report(worker.runner.finished(), socket)
        kind, payload = socket.recv_multipart()
        if kind == channel.PLAN:
            worker.runner.start(wire.decode_plan(payload))
            _report(worker.runner.finished(), socket)
        elif kind == channel.CALL:
            socket.send_multipart([channel.ANSWER, cloudpickle.dumps(_call(worker, payload))])
        elif kind == channel.PING:
            socket.send_multipart([channel.PONG, b""])
        elif kind == channel.STOP:
            logger.debug("cfg rank %d stops", rank)
            return


def _report(reports: list[StepReport], socket: zmq.Socket[bytes]) -> None:
    for report in reports:
        socket.send_multipart([channel.REPORT, wire.encode(report)])


def _call(worker: WorkerWrapperBase, payload: bytes) -> tuple[int, bool, Any]:
    number, method, args, kwargs = cloudpickle.loads(payload)
    try:
        function = getattr(worker, method) if isinstance(method, str) else method
        value = function(*args, **kwargs) if isinstance(method, str) else function(worker.worker, *args, **kwargs)
    except Exception as error:
        traceback.print_exc()
        return number, False, one_line(error)
    return number, True, value
