"""Work-arounds for engines that end by themselves: whoever started one learns that it has ended, and why."""

from __future__ import annotations

import logging
import multiprocessing.connection
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import zmq
from pydantic import ValidationError

from vllm_cfg_plugin.errors import CfgPluginError, ConfigurationError, one_line

_CAUSE_MS = 2000  # the engine's process has ended by then, so what it sent is here or never was
_ENDS = {"EngineCore failed to start.": "could not start", "EngineCore encountered a fatal error.": "died"}
_INTERRUPTED = 130  # a shell's exit code of what Ctrl-C ended
_engine_managers: list[Any] = []
_deaths: list[str] = []
_has_let_go = False


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


def was_stopped() -> bool:
    """Whether this API server stopped its engine, or let go of those of another process."""
    return _has_let_go or any(manager.manager_stopped.is_set() for manager in _engine_managers)


def note_letting_go() -> None:
    """This API server is about to close its connection to engines of another process."""
    global _has_let_go
    _has_let_go = True


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


def end_start_when_interrupted() -> None:
    """Have Ctrl-C and SIGTERM end a `vllm serve` that is just starting its engine.

    Symptom: where the whole process group gets the signal, as from a terminal, `timeout` or systemd, it waits 600 s for
    an engine that has ended. Cause: it waits inside `zmq_socket_ctx`, which swallows KeyboardInterrupt. Exit condition:
    that raises it.
    """
    from vllm.v1.engine import utils

    swallowing = utils.zmq_socket_ctx
    if getattr(swallowing, "raises_interrupts", False):
        return

    @contextmanager
    def zmq_socket_ctx(*args: Any, **options: Any) -> Iterator[Any]:
        interrupt = None
        with swallowing(*args, **options) as socket:
            try:
                yield socket
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    zmq_socket_ctx.raises_interrupts = True  # type: ignore[attr-defined]
    utils.zmq_socket_ctx = zmq_socket_ctx


def serve_and_say_why_the_engine_ended(run: Callable[[Any], None], address: str, args: Any) -> None:
    """Run `vllm serve`; where its engine dies or can't start, end in exit code 1 and a line that says why.

    Symptom: `vllm serve` ends with code 0 when its engine has died, so a supervisor that restarts what failed does not;
    and the reason is somewhere above a page of tracebacks. Cause: the server is stopped as if by a signal, and the
    engine's process writes its reason into the log alone. Exit condition: vLLM raises the reason.
    """
    why = ""
    end_start_when_interrupted()
    try:
        with end_has_cause(address) as cause:
            run(args)
            if _deaths or any(manager.failed_proc_name for manager in _engine_managers):
                why = cause() or "the engine died; the log says why"
    except ConfigurationError as error:
        why = str(error)
    except KeyboardInterrupt:  # before there was a server to stop
        raise SystemExit(_INTERRUPTED) from None
    if why:
        raise SystemExit(f"vllm serve: error: {why}")


def report_end(address: str) -> None:
    """Tell whoever holds `end_has_cause(address)` why the engine of this process ends, or could not start.

    Symptom: the program that starts an engine gets "Engine core initialization failed. See root cause above". Cause:
    the engine's process writes the cause into the log alone. Exit condition: vLLM's error carries it.
    """
    logging.getLogger("vllm.v1.engine.core").addFilter(_EndFilter(address))


def tell_why(address: str, words: str) -> None:
    """Send the cause; of several the first counts."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.LINGER, _CAUSE_MS)
        socket.connect(address)
        socket.send(words.encode())


class _EndFilter(logging.Filter):
    """Sends the cause that EngineCore logs; one of our own errors has no need of a traceback."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and (what := _ENDS.get(record.getMessage())):
            tell_why(self._address, f"the engine {what}: {one_line(error)}")
            if isinstance(error, CfgPluginError):
                record.msg, record.exc_info = f"{record.msg} {one_line(error)}", None
        return True


@contextmanager
def end_has_cause(address: str) -> Iterator[Callable[[], str]]:
    """Start, or run, an engine inside; yields what finds the words of `report_end`, '' if there are none.

    Raises:
        ConfigurationError: it ended in an error of vLLM's that does not say why; says it.
    """
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.bind(address)

        def cause() -> str:
            return socket.recv().decode() if socket.poll(_CAUSE_MS) else ""

        try:
            yield cause
        except RuntimeError as error:
            if words := cause():
                raise ConfigurationError(words) from error
            raise
        except ValidationError as error:  # vLLM's configurations are pydantic's, which wraps what their checks raise
            first = error.errors()[0]
            wrapped = first.get("ctx", {}).get("error")
            name = ".".join(map(str, first["loc"])) or error.title
            raise ConfigurationError(str(wrapped) if wrapped else f"{name}: {first['msg']}") from error
