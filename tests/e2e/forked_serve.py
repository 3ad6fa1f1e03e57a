"""`vllm serve` several times from one interpreter, which imports vLLM once: a fork for each start.

    python forked_serve.py LOG MODEL [OPTION ...] -- LOG MODEL [OPTION ...] ...

Each start has a session of its own and writes to its LOG; prints `PID EXIT_CODE` for each.
"""

from __future__ import annotations

import os
import sys
from itertools import groupby

from vllm.entrypoints.cli.main import main


def serve(log: str, *arguments: str) -> None:
    """The `vllm` command, in this process."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["vllm", "serve", *arguments]
    sys.exit(main())


if __name__ == "__main__":
    starts = [list(words) for is_end, words in groupby(sys.argv[1:], lambda word: word == "--") if not is_end]
    pids = []
    for start in starts:
        pids.append(os.fork())
        if not pids[-1]:
            serve(*start)
    for pid in pids:
        print(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
