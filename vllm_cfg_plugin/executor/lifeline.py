"""Ends this process when its parent is gone, however the parent went; must not import vLLM or torch.

A watching thread and not `prctl(PR_SET_PDEATHSIG)`: that signal comes when the parent's *thread* ends, so an engine
made in a short-lived thread of a live program would be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

_POLL_SECONDS = 0.25


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
