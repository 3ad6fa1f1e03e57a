"""A process ends with its parent, also with one that was gone before the process looked."""

import multiprocessing
import os
import time

import pytest

from vllm_cfg_plugin.executor.lifeline import die_with_parent

FORK = multiprocessing.get_context("fork")


def orphan(pipe, seconds):
    pipe.send("alive")
    time.sleep(seconds)
    die_with_parent()
    time.sleep(30)


def parent(pipe, seconds, lives):
    FORK.Process(target=orphan, args=(pipe, seconds)).start()
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
