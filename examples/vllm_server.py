"""A `vllm serve` process and its log file: start, wait, stop; shared by the examples and the end-to-end tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

HOST = "127.0.0.1"


class ServerError(RuntimeError):
    """The server did not start, or did not stop; the message ends with the tail of its log."""


class VllmServer:
    """The stock `vllm serve MODEL ...` on a free port of this machine.

    Args:
        model: folder or hub id.
        options: further command line options.
        log_path: receives everything the server prints.
        env: variables to add to, or replace in, this process's environment.
    """

    def __init__(
        self, model: str | Path, options: list[str], log_path: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self._log_path = log_path
        vllm = Path(sys.executable).with_name("vllm")
        command = [str(vllm), "serve", str(model), "--host", HOST, "--port", str(self.port), *options]
        with log_path.open("wb") as log:
            # A session of its own: a Ctrl-C in the terminal reaches us alone, and we stop the server in order.
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, start_new_session=True
            )

    def wait_ready(self, timeout_s: float, on_wait: Callable[[], None] = lambda: None) -> None:
        """Return when /health answers; `on_wait` is called a few times a second until then.

        Raises:
            ServerError: the server ended, or is not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"the server ended with exit code {self.process.returncode}:\n{self.log_tail()}")
            if self._is_healthy():
                return
            on_wait()
            time.sleep(0.2)
        raise ServerError(f"the server is not ready after {timeout_s:.0f} s:\n{self.log_tail()}")

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, signal_number: int = signal.SIGINT, timeout_s: float = 30) -> int:
        """End the server as Ctrl-C does; returns its exit code. One that does not end in time is killed.

        Raises:
            ServerError: it had to be killed.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise ServerError(f"the server did not stop within {timeout_s:.0f} s:\n{self.log_tail()}") from None
            finally:  # also on a second, impatient Ctrl-C
                self._kill()
        return self.process.returncode

    def _kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
