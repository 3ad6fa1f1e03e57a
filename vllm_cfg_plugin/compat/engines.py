"""Work-arounds for engines and their clients: who is who, and how those stop that are told to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from vllm_cfg_plugin.compat.engine_deaths import note_letting_go

_ANSWER_S = 1.0  # that a server needs to say 503 before it is killed
_OUTPUT_THREAD_END_S = 10  # it has nothing left to do; should it hang, closing must not


def client_index(client: Any) -> int:
    """Which of several API servers this one is, by its engine client, an `AsyncLLM`: requests carry that number.

    Symptom and cause: vLLM gives plugins no other way to know. Exit condition: it tells them.
    """
    index: int = getattr(client.engine_core, "client_index", 0)
    return index


def count_aborts(client: Any) -> None:
    """Have `vllm:request_success` count the requests of an `AsyncLLM` that were cancelled, as those of reason "abort".

    Symptom: a client that leaves is in no metric. Cause: the engine's answers are counted, and there is none to a
    request that its caller has dropped. Exit condition: vLLM counts them.
    """
    processor, loggers = getattr(client, "output_processor", None), getattr(client, "logger_manager", None)
    if processor is None or loggers is None:
        return
    from vllm.v1.engine import FinishReason

    abort_requests = processor.abort_requests

    def abort_and_count(request_ids: Any, *args: Any, **kwargs: Any) -> list[str]:
        aborted: list[str] = abort_requests(request_ids, *args, **kwargs)
        for stat_logger in loggers.stat_loggers:
            if hasattr(stat_logger, "counter_request_success"):
                first, *_ = stat_logger.counter_request_success[FinishReason.ABORT].values()
                first.inc(len(aborted))
        return aborted

    processor.abort_requests = abort_and_count


def drain_before_shutdown(client: Any, drain: Callable[[float], None]) -> None:
    """Have one of several API servers wait for its running requests before it lets go of the engines.

    Symptom: with `--api-server-count 2` a SIGTERM fails all requests at once, whatever `--shutdown-timeout` says.
    Cause: the servers are stopped before the engines, and each closes its connection to them first. Exit condition:
    vLLM has the servers drain.
    """
    core = getattr(client, "engine_core", None)
    if core is None or core.resources.engine_manager is not None:  # which drains its engines
        return
    shutdown = client.shutdown

    def drain_and_shut_down(timeout: float | None = None) -> None:
        drain(max(0.0, (timeout or 0.0) - _ANSWER_S))
        note_letting_go()
        shutdown(timeout)

    client.shutdown = drain_and_shut_down


def answer_rejected_requests() -> None:
    """Have EngineCore's own answers to pooling requests carry an output, which is empty: the request was aborted.

    Symptom: one request that comes while the engine drains after a SIGTERM fails all that are running. Cause:
    EngineCore rejects it with an answer without `pooling_output`, on which the API server's output handler asserts.
    Exit condition: the handler takes such an answer.
    """
    import torch
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.engine.core import EngineCoreProc

    def send(engine: Any, request_ids: list[str], client_index: int, reason: Any, error: Any = None) -> None:
        details = {} if error is None else {"error": error}  # vLLM 0.32 knows none
        outputs = [
            EngineCoreOutput(id, [], pooling_output=torch.empty(0), finish_reason=reason, **details)
            for id in request_ids
        ]
        message = EngineCoreOutputs(finished_requests=set(request_ids), outputs=outputs)
        engine.output_queue.put_nowait((client_index, message))

    EngineCoreProc._send_finish_outputs_to_client = send  # type: ignore[method-assign]


def end_output_thread(client: Any) -> None:
    """Wait for the thread that receives the engine's answers; to be called after the client's `shutdown()`.

    Args:
        client: the engine's `engine_core`; one without that thread is left alone.

    Symptom: rarely, a program that has done all its work ends with "terminate called without an active exception" and
    SIGABRT. Cause: `SyncMPClient.shutdown` tells this daemon thread to end and does not wait. The thread then frees the
    last image's tensor, whose memory is a ZeroMQ frame, and pyzmq releases the GIL to free that. A thread that wants
    the GIL back while the interpreter ends is unwound by Python (before 3.14), here through a destructor of torch,
    which terminates the process. Exit condition: vLLM joins the thread.
    """
    thread = getattr(client, "output_queue_thread", None)
    if thread is None or thread is threading.current_thread():  # where the garbage collector may have called us
        return
    thread.join(_OUTPUT_THREAD_END_S)
    while not client.outputs_queue.empty():  # unread images must not be freed by a daemon thread that shares the queue
        client.outputs_queue.get_nowait()
