"""The process that ranks are forked from, without a model: it starts ranks, ends them and says how they ended."""

import os
import signal
import time
from contextlib import contextmanager

import psutil
import pytest
from tqdm import tqdm

from vllm_cfg_plugin.errors import ConfigurationError, RankDiedError
from vllm_cfg_plugin.executor import rank_processes, template
from vllm_cfg_plugin.executor.rank_processes import Meeting
from vllm_cfg_plugin.executor.template import Template

MEETING = Meeting("01", "nowhere", "nowhere")


@contextmanager
def no_pipeline(vllm_config):
    if vllm_config == "broken":
        raise ConfigurationError("no such checkpoint")
    yield


@contextmanager
def pipeline_with_a_bar(vllm_config):
    """Killed while it draws."""
    with tqdm.get_lock():
        yield


def end_or_stay(vllm_config, rank, name, address, init_method, is_template):
    """What the second rank does says the configuration."""
    if rank == 1 and vllm_config == "exit at once":
        os._exit(3)
    time.sleep(60)


@pytest.fixture
def make_template(monkeypatch):
    monkeypatch.setattr(template, "pipeline_for_forks", no_pipeline)
    monkeypatch.setattr(rank_processes, "run_worker", end_or_stay)
    made = []

    def make(vllm_config):
        made.append(Template(vllm_config, 10.0))
        return made[-1]

    yield make
    for each in made:
        each.close()


def wait_for_end(ranks, seconds=20):
    deadline = time.monotonic() + seconds
    while not (ended := ranks.why_ended()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return ended


@pytest.mark.parametrize("attempt", range(5))  # it may be dead before anybody looks, or after
def test_a_rank_that_ends_at_once_is_reported_in_every_start(make_template, attempt):
    made = make_template("exit at once")
    for _ in range(4):
        ranks = made.start_ranks(MEETING)
        assert "cfg rank 1 (pid" in (ended := wait_for_end(ranks))
        assert ended.endswith("ended with code 3")
        ranks.end(0.0)


def test_one_process_ends_ranks_and_starts_them_again(make_template):
    """Ranks that run are ended and started again by the same process."""
    made = make_template("stay")
    ranks = made.start_ranks(MEETING)
    process = made._process.pid
    assert ranks.why_ended() == ""
    ranks.end(0.0)
    assert made.start_ranks(MEETING).why_ended() == ""
    assert made._process.pid == process


def test_a_template_that_dies_is_made_again(make_template):
    made = make_template("stay")
    ranks = made.start_ranks(MEETING)
    made._process.kill()
    assert "the process that forks the ranks" in wait_for_end(ranks)
    ranks.end(0.0)
    assert made.start_ranks(MEETING).why_ended() == ""


def test_a_template_killed_in_a_progress_bar_stops_no_other(make_template, monkeypatch):
    """A template that is killed while it draws a progress bar stops no other bar."""
    monkeypatch.setattr(template, "pipeline_for_forks", pipeline_with_a_bar)
    lock = tqdm.get_lock()
    made = make_template("stay")
    made.start_ranks(MEETING)
    made.close()
    assert lock.mp_lock.acquire(timeout=5)
    lock.mp_lock.release()


def test_a_pipeline_that_cannot_be_loaded_says_why(make_template):
    with pytest.raises(ConfigurationError, match=r"^no such checkpoint$"):
        make_template("broken").start_ranks(MEETING)


def test_a_template_that_hangs_is_ended(make_template):
    made = make_template("stay")
    made.start_ranks(MEETING)
    made.answer_seconds = 0.2
    os.kill(made._process.pid, signal.SIGSTOP)
    with pytest.raises(RankDiedError, match="does not answer within"):
        made.start_ranks(MEETING)


def test_a_death_while_the_template_hangs_costs_one_restart(make_template, monkeypatch):
    """A rank that dies while the template hangs costs one restart."""
    monkeypatch.setattr(template, "_WORDS_SECONDS", 0.2)
    made = make_template("stay")
    ranks = made.start_ranks(MEETING)
    hanging = psutil.Process(made._process.pid)
    rank = max(hanging.children(), key=lambda child: child.pid)
    hanging.suspend()
    rank.kill()
    ended = wait_for_end(ranks)
    assert ended == f"the process of cfg rank 1 (pid {rank.pid}) ended, and its parent says nothing"
    made.answer_seconds = 0.2
    ranks.end(0.0)
    assert not hanging.is_running()
    made.answer_seconds = 10.0
    assert made.start_ranks(MEETING).why_ended() == ""
