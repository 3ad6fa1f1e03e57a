"""Encodes and decodes beside the steps: reported when done, cancelled before they begin, failures caught."""

import os
import queue
import sys
import threading

import pytest
import torch

from vllm_cfg_plugin.engine.plan import DECODED
from vllm_cfg_plugin.worker.side_work import SideWork


@pytest.fixture
def side():
    work = SideWork(1, torch.device("cpu"))
    work.reports = queue.Queue()
    work.deliver = lambda report, image: work.reports.put((report, image))
    yield work
    work.close()


def test_an_encode_runs_on_a_thread_of_its_own_and_is_reported(side):
    threads = []
    side.encode(7, 1, lambda: threads.append(threading.get_ident()))
    report, image = side.reports.get(timeout=10)
    assert (report.id, report.branch, report.rank, report.error) == (7, 1, 1, "")
    assert image is None
    assert threads != [threading.get_ident()]


def test_a_decode_brings_its_image(side):
    side.decode(3, lambda: torch.full((1, 4, 6, 3), 9, dtype=torch.uint8))
    report, image = side.reports.get(timeout=10)
    assert (report.id, report.branch, report.shape) == (3, DECODED, (1, 4, 6, 3))
    assert image.max() == 9


def test_a_failure_is_reported_with_what_was_being_done(side):
    side.decode(3, lambda: 1 / 0)
    report, image = side.reports.get(timeout=10)
    assert "failed while decoding its image: ZeroDivisionError" in report.error
    assert image is None


def test_a_long_decode_does_not_hold_up_an_encode(side):
    may_end = threading.Event()
    side.decode(3, lambda: may_end.wait(10) and torch.zeros(1, 1, 3, dtype=torch.uint8))
    side.encode(4, 0, lambda: None)
    assert side.reports.get(timeout=10)[0].id == 4
    may_end.set()
    assert side.reports.get(timeout=10)[0].id == 3


def test_what_was_cancelled_before_it_began_never_runs(side):
    may_end, ran = threading.Event(), []
    side.encode(1, 0, lambda: may_end.wait(10) and None)
    side.encode(2, 0, lambda: ran.append(2))
    side.encode(2, 1, lambda: ran.append(2))
    side.encode(3, 0, lambda: ran.append(3))
    side.cancel(2)
    may_end.set()
    assert [side.reports.get(timeout=10)[0].id for _ in range(2)] == [1, 3]
    assert ran == [3]


def test_side_work_computes_without_autograd_and_with_one_thread(side):
    found = []
    side.encode(1, 0, lambda: found.extend([torch.is_inference_mode_enabled(), torch.get_num_threads()]))
    side.reports.get(timeout=10)
    assert found == [True, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a priority of its own on Linux alone")
@pytest.mark.parametrize("started_with", [0, 7])
def test_side_threads_give_way_to_the_steps(side, started_with):
    """Also in a process that was started with `nice`."""

    def priority():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def step():
        os.nice(started_with)
        side.encode(1, 0, lambda: niceness.append(priority()))
        side.decode(2, lambda: niceness.append(priority()))
        niceness.append(priority())

    niceness = []
    thread = threading.Thread(target=step)  # whose niceness is its own
    thread.start()
    thread.join()
    for _ in range(2):
        side.reports.get(timeout=10)
    steps, encodes, decodes = sorted(niceness)
    assert steps < encodes < decodes
    assert steps >= started_with
