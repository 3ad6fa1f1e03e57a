"""A collector of OpenTelemetry's traces: OTLP over HTTP, as much of it as receiving spans takes."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

_ENV = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}  # milliseconds


class Collector:
    """Receives spans on a free port of this machine.

    Attributes:
        endpoint: for `--otlp-traces-endpoint`.
        env: that the server needs beside it.
    """

    env = _ENV

    def __init__(self) -> None:
        self._spans: list[Span] = []
        spans = self._spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                spans.extend(span for of in message.resource_spans for scope in of.scope_spans for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def spans_of(self, trace_id: str, count: int, timeout_s: float = 20) -> list[Span]:
        """The spans of a trace, once there are as many.

        Raises:
            TimeoutError: there are not.
        """
        deadline = time.monotonic() + timeout_s
        while len(found := [span for span in self._spans if span.trace_id.hex() == trace_id]) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(found)} spans of {trace_id}, {len(self._spans)} of all, after {timeout_s} s")
            time.sleep(0.1)
        return found

    def __enter__(self) -> Collector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
