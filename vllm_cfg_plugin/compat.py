"""Work-arounds for upstream behaviour, one function each: symptom, cause, and when it can go; safe to call again."""

from __future__ import annotations

import os
import socket


def release_inherited_listeners() -> None:
    """Let go of TCP listening sockets that a forked worker inherited from the API server.

    Symptom: after the server is killed, its port stays "in use" for as long as a worker lives, and clients connect to a
        socket that nobody serves. Cause: vLLM binds the port before it forks the engine, and the engine forks us. The
        descriptors are
    replaced and not closed: Python objects of the parent still name them here, and would close whatever reused the
        number.
    Exit condition: vLLM marks the socket close-on-fork or starts its engine before it binds.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        fd = int(name)
        if fd != null and _is_listening_tcp(fd):
            os.dup2(null, fd)
    os.close(null)


def _is_listening_tcp(fd: int) -> bool:
    try:
        duplicate = socket.socket(fileno=os.dup(fd))
    except OSError:
        return False
    with duplicate:
        if duplicate.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        return bool(duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
