"""Which trace the HTTP request at hand is a part of, by its headers of W3C trace context: vLLM's spans continue it."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

from vllm.tracing import extract_trace_headers

_headers: ContextVar[Mapping[str, str] | None] = ContextVar("trace_headers", default=None)


def take_over(headers: Mapping[str, str]) -> None:
    """Note the headers of an HTTP request, in whose task this is called."""
    _headers.set(extract_trace_headers(headers) or None)


def trace_headers() -> Mapping[str, str] | None:
    """Those of the HTTP request that the current task, or the one that started it, answers; None without any."""
    return _headers.get()
