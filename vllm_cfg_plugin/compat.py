"""Work-arounds for upstream behaviour, one function each: symptom, cause, and when it can go; safe to call again.

Where vLLM 0.32 and 0.33 differ, what we write suits both, and nothing asks for the release:
- `Executor.set_kv_cache_layout` takes one argument more in 0.33: ours takes any.
- `SchedulerInterface.has_request` is abstract in 0.33 and unknown to 0.32: ours is an ordinary method.
- A paused engine of 0.33 rejects new requests with `RetryableRequestError`, where that of 0.32 keeps them waiting:
  `EngineCalls` makes it our own error.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing.connection
import multiprocessing.process
import os
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import zmq
from pydantic import ValidationError
from tqdm import tqdm

from vllm_cfg_plugin.errors import ConfigurationError, one_line

_APOSTROPHE = "\ue000"  # of Unicode's private use: no text has it
_CAUSE_MS = 2000  # the engine's process has ended by then, so what it sent is here or never was
_engine_managers: list[Any] = []
_deaths: list[str] = []
_ANSWER_S = 1.0  # that a server needs to say 503 before it is killed
_OUTPUT_THREAD_END_S = 10  # it has nothing left to do; should it hang, closing must not


def release_inherited_listeners() -> None:
    """Let go of TCP sockets that a forked worker inherited from the API server, which listens on them or soon will.

    Symptom: after the server is killed, its port stays "in use" for as long as a worker lives, and clients connect to a
    socket that nobody serves. Cause: vLLM binds the port before it forks the engine, and the engine forks us. The
    descriptors are replaced and not closed: Python objects of the parent still name them here, and would close whatever
    reused the number. Exit condition: vLLM marks the socket close-on-fork or starts its engine before it binds.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        fd = int(name)
        if fd != null and _is_tcp_server(fd):
            os.dup2(null, fd)
    os.close(null)


def _is_tcp_server(fd: int) -> bool:
    """Whether it listens, or is bound and connected to nobody: vLLM listens only once its engine is ready."""
    try:
        duplicate = socket.socket(fileno=os.dup(fd))
    except OSError:
        return False
    with duplicate:
        if duplicate.family not in (socket.AF_INET, socket.AF_INET6) or duplicate.type != socket.SOCK_STREAM:
            return False
        try:
            duplicate.getpeername()
        except OSError:
            return duplicate.getsockname()[1] != 0
        return False


def release_inherited_wakeup() -> None:
    """Stop passing this process's signals on to the event loop of the process that forked it.

    Symptom: a SIGTERM or SIGINT of the engine's process reaches the API server's handlers too. Cause: the API server's
    loop has Python write signal numbers into its socket, and a forked process writes into the same one. Exit condition:
    vLLM resets `signal.set_wakeup_fd` in the engines that it forks.
    """
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


def let_have_children() -> None:
    """Allow this process, which `multiprocessing` made as a daemon, to make processes itself.

    Symptom: "daemonic processes are not allowed to have children". Cause: `multiprocessing` ends daemons by SIGTERM
    when their parent exits, and wants nobody to be orphaned so; ours end with their parent (see
    `executor/lifeline.py`). Exit condition: it allows that to those who say so.
    """
    multiprocessing.process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def unshare_progress_lock() -> None:
    """Give this process, which was forked, a lock of its own for progress bars.

    Symptom: after a kill -9 of one process the next progress bar of another, such as that of loading the model again,
    waits for ever. Cause: tqdm's lock is a semaphore that forked processes share, and who is killed does not release
    it. Exit condition: tqdm makes a new one after a fork.
    """
    tqdm.set_lock(threading.RLock())


def wake_on_engine_death(client: Any) -> None:
    """Make `LLMEngine.step()` raise EngineDeadError when the process of EngineCore ends.

    Args:
        client: the engine's `engine_core`; one without processes of its own is left alone.

    Symptom: after a kill -9 of EngineCore an offline `step()` waits for ever. Cause: `SyncMPClient.get_output` waits on
    a queue that vLLM's own monitor thread tells nothing. Exit condition: the monitor does.
    """
    manager = getattr(getattr(client, "resources", None), "engine_manager", None)
    if manager is None or not hasattr(client, "outputs_queue"):
        return
    from vllm.v1.engine.exceptions import EngineDeadError

    sentinels, outputs = manager.sentinels(), client.outputs_queue

    def watch() -> None:
        multiprocessing.connection.wait(sentinels)
        outputs.put_nowait(EngineDeadError())

    threading.Thread(target=watch, daemon=True, name="cfg-engine-watch").start()


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
        shutdown(timeout)

    client.shutdown = drain_and_shut_down


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


def explain_unauthorized() -> None:
    """Have vLLM's check of `--api-key` answer with OpenAI's error object.

    Symptom: {"error": "Unauthorized"}, which OpenAI's clients can't take apart. Cause: vLLM writes it so. Exit
    condition: it writes an object.
    """
    from starlette.responses import JSONResponse
    from vllm.entrypoints.serve.middleware import authenticate

    message = "the API key is wrong or missing: send one of those of --api-key as a bearer token"
    body = {"error": {"message": message, "type": "AuthenticationError", "param": None, "code": 401}}
    authenticate.JSONResponse = lambda content, status_code: JSONResponse(body, status_code)  # type: ignore[misc, assignment]


def note_engine_client(client: Any) -> None:
    """Have `run_and_fail_if_engine_died` know of an API server's engine client, an `AsyncLLM`."""
    manager = client.engine_core.resources.engine_manager
    if manager is None:  # whose engines another process watches
        return

    def note_death(_: object) -> None:
        if not manager.manager_stopped.is_set():
            _deaths.append("reported by itself")

    _engine_managers.append(manager)
    client.output_handler.add_done_callback(note_death)


def run_and_fail_if_engine_died(run: Callable[[Any], None], args: Any) -> None:
    """Run a subcommand of `vllm`, and end in exit code 1 when the engine of its server has died.

    Symptom: `vllm serve` ends with code 0 then, and a supervisor that restarts what failed does not. Cause: the server
    is stopped as if by a signal. Exit condition: vLLM raises.
    """
    run(args)
    if _deaths or any(manager.failed_proc_name for manager in _engine_managers):
        raise SystemExit("the engine died; the log says why")


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


def report_failed_start(address: str) -> None:
    """Tell whoever holds `failed_start_has_cause(address)` why the engine of this process could not start.

    Symptom: the program that starts an engine gets "Engine core initialization failed. See root cause above". Cause:
    the engine's process writes the cause into the log alone. Exit condition: vLLM's error carries it.
    """
    logging.getLogger("vllm.v1.engine.core").addHandler(_FailedStartHandler(address))


class _FailedStartHandler(logging.Handler):
    def __init__(self, address: str) -> None:
        super().__init__(logging.ERROR)
        self._address = address

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] and "failed to start" in record.getMessage():
            with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
                socket.setsockopt(zmq.LINGER, _CAUSE_MS)
                socket.connect(self._address)
                socket.send(one_line(record.exc_info[1]).encode())


@contextmanager
def failed_start_has_cause(address: str) -> Iterator[None]:
    """Start an engine inside; see `report_failed_start`.

    Raises:
        ConfigurationError: the engine could not start; says why.
    """
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.bind(address)
        try:
            yield
        except RuntimeError as error:
            if not socket.poll(_CAUSE_MS):
                raise
            raise ConfigurationError(f"the engine could not start: {socket.recv().decode()}") from error
        except ValidationError as error:  # vLLM's configurations are pydantic's, which wraps what their checks raise
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            name = ".".join(map(str, first["loc"])) or error.title
            raise ConfigurationError(str(cause) if cause else f"{name}: {first['msg']}") from error


# How records begin that are about language models, or look like a fault where there is none.
_UNTRUE = (
    "non-default args",  # with defaults of ours among them, and lengths that nobody asked for
    "Resolved `--runner auto`",
    "Resolved architecture",
    "Using max model len",
    "Chunked prefill is enabled",
    "Disabling chunked prefill",
    "Model Runner V2 requires",
    "Using V1 model runner",
    "Final IR op priority",
    "Enabled custom fusion",
    "Initializing a V1 LLM engine",
    "world_size=",
    "Using %s KV cache layout",
    "init engine (profile",
    "Using custom scheduler class",
    "Inductor compilation was disabled",
    "Resolved pooling config",
    "Supported tasks",
    "Available plugins for group",
    "- %s -> %s",
    "Loading plugin",
    "Loaded endpoint plugin",
    "Registered config parser",
    "Using None for EOS token",
    "Available routes are",
    "Route: ",
    "Failed to import from vllm._C",
    "Chat template warmup failed",
    "AsyncLLM created with api_server_count",
)


def quiet_logs() -> None:
    """Drop records that say nothing true of a diffusion pipeline; with a log level of debug they stay.

    Symptom: a start writes sixty lines on KV caches, chunked prefill and the like, a third of them warnings, and a
    traceback "Chat template warmup failed"; the end writes fifty on "leaked" functions. Cause: vLLM prepares every
    model as one of language; nanobind counts what triton holds until the process ends, when it says so on stderr, after
    everything else. Exit condition: vLLM asks what a model is first; triton lets go.
    """
    from vllm.logger import DEFAULT_LOGGING_CONFIG

    config: dict[str, Any] = DEFAULT_LOGGING_CONFIG  # which each process applies anew
    config["filters"] = {"quiet": {"()": QuietFilter}}
    config["handlers"]["vllm"]["filters"] = ["quiet"]
    handlers: list[logging.Filterer] = [*logging.getLogger("vllm").handlers]
    for filterer in (*handlers, logging.getLogger("transformers.utils.import_utils")):
        if not any(isinstance(present, QuietFilter) for present in filterer.filters):
            filterer.addFilter(QuietFilter())
    if _end_quietly not in _registered:
        _registered.append(_end_quietly)
        atexit.register(_end_quietly)


_registered: list[Callable[[], None]] = []


def _end_quietly() -> None:
    """Registered early, so called last; what the interpreter's own end writes comes after it."""
    if "triton" in sys.modules and not logging.getLogger("vllm").isEnabledFor(logging.DEBUG):
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class QuietFilter(logging.Filter):
    """See `quiet_logs`."""

    def filter(self, record: logging.LogRecord) -> bool:
        if logging.getLogger("vllm").isEnabledFor(logging.DEBUG):
            return True
        message = str(record.msg)
        return not message.startswith(_UNTRUE) and "requires torchvision (not installed)" not in message


def remove_dead_routes(app: Any) -> None:
    """Take out routes of vLLM's that can do nothing for a diffusion pipeline.

    Symptom: /tokenize, /pooling and others are described in /docs and answer with errors. Cause: vLLM adds them for
    every model of the pooling runner. Exit condition: it asks what the model can do.
    """
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in _DEAD_ROUTES]


_DEAD_ROUTES = frozenset(
    (
        *(
            "/tokenize",
            "/detokenize",
            "/pooling",
            "/invocations",
            "/kv_event_sources",
            "/v1/systemone",
            "/v1/decisions",
        ),
        *("/v1/embeddings", "/v2/embed", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    )
)


def silence_all_gather_deprecation() -> None:
    """Drop one warning of a worker.

    Symptom: a FutureWarning on the first step. Cause: torch 2.13 renamed the collective that vLLM's GroupCoordinator
    calls. Exit condition: vLLM calls `all_gather_single`.
    """
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated", category=FutureWarning)


def let_unipc_run_ahead(scheduler: Any, device: Any) -> None:
    """Have a UniPC noise scheduler, its timesteps set, step latents on a GPU without waiting for it.

    To be called once, and `unipc_runs_ahead` around each step. Other noise schedulers are left alone.

    Symptom: each of its steps waits several times for all that is queued on the GPU. Cause: diffusers copies noise
    levels there one by one, and has torch check that a system of two equations has a solution. Exit condition:
    diffusers computes these numbers where the timesteps are.
    """
    if device.type == "cuda" and type(scheduler).__name__ == "UniPCMultistepScheduler":
        scheduler.sigmas = scheduler.sigmas.to(device)


def unipc_runs_ahead(scheduler: Any, device: Any) -> AbstractContextManager[object]:
    """See `let_unipc_run_ahead`."""
    if device.type != "cuda" or type(scheduler).__name__ != "UniPCMultistepScheduler":
        return nullcontext()
    from torch.overrides import TorchFunctionMode

    class Unchecked(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            import torch

            if func is torch.linalg.solve:
                return torch.linalg.solve_ex(*args, check_errors=False)[0]
            return func(*args, **(kwargs or {}))

    return Unchecked()


def split_contractions_alike() -> None:
    """Keep words such as "don't" whole in LongCat-Image's prompts.

    Symptom: "I don't, you can't" becomes "I can'tcan't, you can't", and another text in another process, so that the
    same request gives another image after a restart. Cause: diffusers' `split_quotation` puts stand-ins for such words,
    one of which is a part of the next, and walks a set, whose order follows the process's hash seed. Exit condition:
    diffusers walks them in order and gives each a stand-in of its own.
    """
    from diffusers.pipelines.longcat_image import pipeline_longcat_image, pipeline_longcat_image_edit

    modules: tuple[Any, ...] = (pipeline_longcat_image, pipeline_longcat_image_edit)
    for module in modules:
        upstream = module.split_quotation
        if getattr(upstream, "keeps_contractions", False):
            continue

        def split(prompt: str, *args: Any, upstream: Any = upstream) -> list[tuple[str, bool]]:
            hidden = re.sub(r"(?<=[a-zA-Z])'(?=[a-zA-Z])", _APOSTROPHE, prompt)
            return [(part.replace(_APOSTROPHE, "'"), is_quoted) for part, is_quoted in upstream(hidden, *args)]

        split.keeps_contractions = True  # type: ignore[attr-defined]
        module.split_quotation = split


def let_vl_processors_do_without_videos() -> None:
    """Make Qwen2VLProcessor a processor of texts and images where torchvision is missing.

    Symptom: without torchvision it can neither be made (AttributeError: `_extra_content`) nor loaded (ImportError).
    Cause: transformers 5 asks every such processor for a video processor too, and those exist for torchvision alone;
    images have a PIL one. Exit condition: transformers makes `video_processor` optional.
    """
    from transformers import Qwen2VLProcessor
    from transformers.utils import is_torchvision_available

    processor_class: Any = Qwen2VLProcessor
    if not is_torchvision_available():
        processor_class.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])
