"""Work-arounds for what vLLM, transformers and triton say that is not true of a diffusion pipeline."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from vllm_cfg_plugin.compat import engine_deaths

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


def quiet_logs_of_children() -> None:
    """Have `quiet_logs_of_child` act in the processes that this one spawns: further API servers, engines of replicas.

    Not a name of vLLM's, which warns of those that begin like its own and that it doesn't know.
    """
    os.environ[_QUIET] = "1"


def quiet_logs_of_child() -> None:
    """`quiet_logs`, in a process that one of a diffusion pipeline spawned; vLLM loads plugins early in each."""
    if os.environ.get(_QUIET):
        quiet_logs()


_QUIET = "CFG_PLUGIN_QUIET_LOGS"
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
        if message == "AsyncLLM output_handler failed." and engine_deaths.was_stopped():
            return False  # the server's own shutdown brings it about
        return not message.startswith(_UNTRUE) and "requires torchvision (not installed)" not in message
