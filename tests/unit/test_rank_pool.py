"""The monitor of the ranks' processes."""

import os
import threading

from vllm_cfg_plugin.executor import rank_pool


class FakeProcess:
    """A process whose exit code, as a real one's, is known only a moment after its sentinel."""

    def __init__(self, pid, has_ended):
        self.pid = pid
        self.exitcode = None
        self.sentinel, writer = os.pipe()
        if has_ended:
            os.close(writer)

    def join(self):
        self.exitcode = -9


def test_the_monitor_names_the_rank_that_died(monkeypatch):
    lines, calls = [], []
    monkeypatch.setattr(rank_pool.logger, "error", lambda text, *args: lines.append(text % args))
    processes = [FakeProcess(100, has_ended=False), FakeProcess(101, has_ended=True)]
    rank_pool._watch(processes, threading.Event(), lambda: calls.append("dead"))
    assert lines == ["The process of cfg rank 1 (pid 101) ended with code -9"]
    assert calls == ["dead"]
