"""Ends this process when its parent is gone, however the parent went; must not import vLLM or torch.

A watching thread and not `prctl(PR_SET_PDEATHSIG)`: that signal comes when the parent's *thread* ends, so an engine
made in a short-lived thread of a live program would be killed. Ranks whose parent is the process of one thread that
forks them have the signal too: it ends a rank that is stopped, whose threads don't run.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time

_POLL_SECONDS = 0.25
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Kill this process within a moment of its parent's end; for processes that `multiprocessing` made."""
    process = multiprocessing.parent_process()
    if process is None:
        raise RuntimeError("this process was not made by multiprocessing: it has no parent to watch")
    parent = process.pid  # and not os.getppid(), which is somebody else once the parent is gone

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="cfg-lifeline").start()


def die_with_parents_thread() -> None:
    """Have the kernel kill this process, even a stopped one, when the thread that forked it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
