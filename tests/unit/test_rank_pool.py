"""The pool's messages, with threads for ranks: which silence means that a rank hangs, and which does not."""

import threading
import time

import pytest
import zmq

from vllm_cfg_plugin.errors import ConfigurationError, RankDiedError
from vllm_cfg_plugin.executor import channel
from vllm_cfg_plugin.executor.rank_pool import RankPool
from vllm_cfg_plugin.executor.rank_processes import RankProcesses

ANSWER_SECONDS = 0.3


class ThreadsAsRanks(RankProcesses):
    """Each answers a PLAN with its payload, a CALL after so many seconds, and a PING; none where it hangs."""

    def __init__(self, meeting, hanging=(), call_seconds=0.0, first=channel.READY):
        self._hanging = hanging
        self._call_seconds = call_seconds
        self._threads = [
            threading.Thread(target=self._run, args=(meeting.address, rank, first), daemon=True)
            for rank in range(len(meeting.names))
        ]
        for thread in self._threads:
            thread.start()

    sentinels = ()

    def why_ended(self):
        return ""

    def end(self, grace):
        """They end with the pool's context, or with the tests."""

    def _run(self, address, rank, first):
        answers = {channel.PLAN: channel.REPORT, channel.CALL: channel.ANSWER, channel.PING: channel.PONG}
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IDENTITY, channel.identity(rank))
            socket.connect(address)
            socket.send_multipart([first, b"no such checkpoint"])
            while (message := socket.recv_multipart())[0] != channel.STOP:
                kind, payload = message
                if rank not in self._hanging:
                    time.sleep(self._call_seconds if kind == channel.CALL else 0)
                    socket.send_multipart([answers[kind], payload])


def read_answer(kind, frames):
    asked = {channel.REPORT: channel.PLAN, channel.ANSWER: channel.CALL, channel.PONG: channel.PING}
    return (asked[kind], 0), bytes(frames[0])


@pytest.fixture
def make_pool():
    pools = []

    def make(**ranks):
        pools.append(
            RankPool(lambda meeting: ThreadsAsRanks(meeting, **ranks), "01", read_answer, lambda: ANSWER_SECONDS)
        )
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_the_answers_of_all_ranks_are_merged(make_pool):
    assert make_pool().send_to_all(channel.PLAN, 0, b"plan", b" ".join).result() == b"plan plan"


def test_a_rank_that_reports_no_plan_hangs(make_pool):
    with pytest.raises(RankDiedError, match=r"sent nothing for 0.3 s \(--cfg-step-timeout\)"):
        make_pool(hanging=[1]).send_to_all(channel.PLAN, 0, b"plan", list).result()


def test_a_call_may_take_as_long_as_it_takes(make_pool):
    answers = make_pool(call_seconds=3 * ANSWER_SECONDS).send_to_all(channel.CALL, 0, b"call", list)
    assert answers.result() == [b"call"] * 2
    with pytest.raises(TimeoutError):
        make_pool(hanging=[0]).send_to_all(channel.CALL, 0, b"call", list).result(timeout=0.1)


def test_ranks_silent_in_side_work_are_asked_if_they_live(make_pool):
    """While nothing but side work is due silent ranks are asked whether they live."""
    for hanging in ([], [0]):
        pool = make_pool(hanging=hanging)
        pool.check_silence()
        assert not pool.has_pending, "it is too early to ask"
        pool.heard -= 2 * ANSWER_SECONDS
        if not hanging:
            pool.check_silence()
            continue
        with pytest.raises(RankDiedError):
            pool.check_silence()


def test_a_rank_that_cannot_start_says_why(make_pool):
    with pytest.raises(ConfigurationError, match=r"^cfg rank [01] could not start: no such checkpoint$"):
        make_pool(first=channel.FAILED)
