"""Work-arounds for what a forked process inherits."""

from __future__ import annotations

import multiprocessing.process
import os
import signal
import socket
import threading

from tqdm import tqdm


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
