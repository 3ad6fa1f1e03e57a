"""A process ends with its parent, also with one that was gone before the process looked."""

import multiprocessing
import os
import signal
import sys
import time

import pytest

from vllm_cfg_plugin.executor.lifeline import die_with_parent, die_with_parents_thread

FORK = multiprocessing.get_context("fork")


def orphan(pipe, seconds):
    pipe.send("alive")
    time.sleep(seconds)
    die_with_parent()
    time.sleep(30)


def stopped_orphan(pipe, _):
    die_with_parents_thread()
    pipe.send("alive")
    os.kill(os.getpid(), signal.SIGSTOP)


def parent(pipe, seconds, lives, child=orphan):
    FORK.Process(target=child, args=(pipe, seconds)).start()
    pipe.close()
    time.sleep(lives)
    os._exit(0)


@pytest.mark.parametrize(("seconds", "lives"), [(0, 0.5), (0.5, 0)])
def test_it_ends_with_its_parent(seconds, lives):
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=parent, args=(theirs, seconds, lives))
    process.start()
    theirs.close()
    process.join()
    assert ours.recv() == "alive"
    assert ours.poll(5), "the orphan lives on"
    with pytest.raises(EOFError):
        ours.recv()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel does that")
def test_a_stopped_process_ends_with_its_parent():
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=parent, args=(theirs, 0, 0.5, stopped_orphan))
    process.start()
    theirs.close()
    process.join()
    assert ours.recv() == "alive"
    assert ours.poll(5), "the orphan is stopped for ever"
    with pytest.raises(EOFError):
        ours.recv()
