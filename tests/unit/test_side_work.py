"""Work beside the steps: reported when done, stopped when cancelled, failures caught, short never behind long."""

import os
import queue
import sys
import threading
import time

import pytest
import torch

from vllm_cfg_plugin.engine.plan import DECODED
from vllm_cfg_plugin.errors import InputsRefusedError
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


def test_what_a_pipeline_refuses_is_reported_in_its_own_words(side):
    def encode():
        raise InputsRefusedError("a cat is too small")

    side.encode(3, 0, encode)
    report, _ = side.reports.get(timeout=10)
    assert (report.error, report.is_refused) == ("a cat is too small", True)


def pixels():
    return torch.zeros(1, 1, 3, dtype=torch.uint8)


LONG = {
    "decode": lambda side, run: side.decode(3, run),
    "long decode": lambda side, run: side.decode(3, run, is_long=True),
    "long encode": lambda side, run: side.encode(3, 0, run, is_long=True),
    "forward": lambda side, run: side.forward(3, run),
}


@pytest.mark.parametrize("name", LONG)
def test_long_work_does_not_hold_up_an_encode_nor_a_short_decode(side, name):
    may_end = threading.Event()
    LONG[name](side, lambda: may_end.wait(10) and pixels())
    side.encode(4, 0, lambda: None)
    if name != "decode":
        side.decode(5, pixels)
        assert {side.reports.get(timeout=10)[0].id for _ in range(2)} == {4, 5}
    else:
        assert side.reports.get(timeout=10)[0].id == 4
    may_end.set()
    assert side.reports.get(timeout=10)[0].id == 3


def test_long_forwards_and_decodes_wait_not_for_each_other(side):
    both = threading.Barrier(2)

    def meet():
        both.wait(10)

    side.forward(1, meet)
    side.decode(2, meet, is_long=True)
    assert {side.reports.get(timeout=10)[0].error for _ in range(2)} == {""}


def compute_for_ever(begun):
    """Torch operations, one of which catches what others raise, as models may; for a minute at most."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            torch.zeros(2) + 1
        except Exception:
            raise AssertionError("a model must not see that its work was cancelled") from None
        begun.set()
    return pixels()


@pytest.mark.parametrize("name", [name for name in LONG if name != "decode"])
def test_cancelled_long_work_stops_at_its_next_operation(side, name):
    """Long work stops at its next operation when it is cancelled."""
    begun = threading.Event()
    LONG[name](side, lambda: compute_for_ever(begun))
    begun.wait(10)
    side.cancel(3)
    LONG[name](side, pixels)  # the thread is free again; what comes later is no part of what was cancelled
    assert side.reports.get(timeout=10)[0].error == ""
    assert side.reports.empty()
    assert not side._works


def test_closing_stops_long_work(side):
    begun, ended = threading.Event(), threading.Event()

    def run():
        try:
            compute_for_ever(begun)
        finally:
            ended.set()

    side.forward(3, run)
    begun.wait(10)
    side.close()
    assert ended.wait(10)


def test_stopping_when_cancelled_changes_no_bit(side):
    layer, rows = torch.nn.Linear(64, 64), torch.randn(128, 64)
    results = []

    def run():
        results.append(torch.nn.functional.scaled_dot_product_attention(*[layer(rows)[None, None]] * 3))

    side.encode(1, 0, run)
    side.forward(2, run)
    for _ in range(2):
        assert side.reports.get(timeout=10)[0].error == ""
    assert torch.equal(*results)


class CountingGroup:
    """A sequence group whose other ranks are not there."""

    def __init__(self, is_stoppable):
        self.is_stoppable = is_stoppable
        self.failures = 0

    def fail(self):
        self.failures += 1


@pytest.mark.parametrize("is_stoppable", [True, False])
def test_a_cancelled_forward_keeps_step_with_its_group(side, is_stoppable):
    """The other ranks may be in the midst of it: they are told, or where that can't be it is done all the same."""
    group, may_end, ran = CountingGroup(is_stoppable), threading.Event(), []
    side.forward(1, lambda: may_end.wait(10) and None)
    side.forward(3, lambda: ran.append(3), group)
    side.cancel(3)
    may_end.set()
    side.forward(4, lambda: None)
    assert [side.reports.get(timeout=10)[0].id for _ in range(2)] == [1, 4]
    assert (group.failures, ran) == ((1, []) if is_stoppable else (0, [3]))


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
        side.decode(3, lambda: niceness.append(priority()), is_long=True)
        side.forward(4, lambda: niceness.append(priority()))
        niceness.append(priority())

    niceness = []
    thread = threading.Thread(target=step)  # whose niceness is its own
    thread.start()
    thread.join()
    for _ in range(4):
        side.reports.get(timeout=10)
    steps, encodes, decodes, *long = sorted(niceness)
    assert steps < encodes < decodes < long[0] == long[1]
    assert steps >= started_with
