"""A rank whose host runs a step ahead of its device: the same latents, failures known a step later, reports in time."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from tests.toy_pipeline import InlineSideWork, ToyPipeline, toy_request
from tests.unit.fake_cuda import DEVICE, fake_cuda, to_fake
from tests.unit.test_runner import join, plan
from vllm_cfg_plugin.engine.plan import DECODED, Assign, Decode
from vllm_cfg_plugin.worker.pace import CudaPace
from vllm_cfg_plugin.worker.runner import StepRunner
from vllm_cfg_plugin.worker.side_work import SideThread


class DeviceMark:
    def __init__(self, pace):
        self.place, self._pace = pace.queued, pace

    def is_reached(self):
        return self._pace.done >= self.place

    def wait(self):
        self._pace.waits.append(self._pace.queued - self.place)
        self._pace.done = max(self._pace.done, self.place)

    def seconds(self):
        assert self.is_reached()
        return float(self.place)


class DevicePace:
    """Of a device that gets as far as a test lets it; places in its queue are counted in marks."""

    steps_ahead = 1

    def __init__(self):
        self.queued = self.done = 0
        self.waits = []  # how many marks were behind the one that was waited for

    stepping = staticmethod(nullcontext)

    def mark(self):
        self.queued += 1
        return DeviceMark(self)

    def to_host(self, tensor):
        return tensor

    def hand_over(self, tensor):
        """There is one memory."""


class Ranks:
    """Two ranks that step together."""

    def __init__(self, make_pace):
        self._barrier, self._rows = threading.Barrier(2), [None, None]
        self.pipelines = [ToyPipeline(), ToyPipeline()]
        self.runners = [
            StepRunner(pipeline, rank, 2, self._gather(rank), InlineSideWork(rank), make_pace())
            for rank, pipeline in enumerate(self.pipelines)
        ]

    def _gather(self, rank):
        def gather(row):
            self._rows[rank] = row
            self._barrier.wait(10)
            rows = torch.stack(self._rows)
            self._barrier.wait(10)
            return rows

        return gather

    def start(self, step):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda runner: runner.start(step), self.runners))

    def failures(self):
        return [
            failure for runner in self.runners for report in runner.finished(wait=True) for failure in report.failed
        ]


REQUESTS = [toy_request("a cat", steps=9), toy_request("a dog", steps=9, seed=1, scale=2.0)]
OWNERS = [(0, 1), (1, 0)]


def unlucky_from(ranks, step):
    """Rank 1 fails the branches of the first request from a step on."""
    steps = iter(range(100))

    def fail(sequences):
        if next(steps) >= step and any(sequence.request.prompts[0] == "a cat" for sequence in sequences):
            raise ValueError("out of luck")

    ranks.pipelines[1].transformer.fail = fail


def test_latents_are_those_of_a_rank_that_waits():
    ahead, waiting = Ranks(DevicePace), Ranks(lambda: None)
    for ranks in (ahead, waiting):
        ranks.start(join(REQUESTS, OWNERS))
        for step in range(1, 5):
            ranks.start(plan(step))
    for runner, other in zip(ahead.runners, waiting.runners, strict=True):
        for id, state in other.states.items():
            assert torch.equal(runner.states[id].latents, state.latents)


def test_a_failure_drops_its_request_a_step_later_on_all_ranks():
    ranks, lucky = Ranks(DevicePace), Ranks(DevicePace)
    unlucky_from(ranks, 2)
    seen = []
    for step in range(6):
        for each in (ranks, lucky):
            each.start(plan(step) if step else join(REQUESTS, OWNERS))
        seen.append([sorted(runner.states) for runner in ranks.runners])
    assert seen == [[[0, 1]] * 2] * 3 + [[[1]] * 2] * 3
    assert [id for id, _ in ranks.failures()] == [0]
    assert torch.equal(ranks.runners[0].states[1].latents, lucky.runners[0].states[1].latents)


def test_the_host_waits_for_the_step_before_and_for_no_later_one():
    runner = Ranks(DevicePace).runners[0]
    runner._step._all_gather = lambda row: torch.stack([row, row])
    runner.start(join(REQUESTS, OWNERS))
    assert runner._pace.waits == []
    runner.start(plan(1))
    # A mark each at a step's start, behind its exchange and at its end: of the last step there are two behind this one.
    assert runner._pace.waits == [3]
    runner.start(plan(2))
    assert runner._pace.waits == [3, 3]


def test_a_plan_is_reported_when_the_device_has_done_it():
    runner = Ranks(DevicePace).runners[0]
    runner._step._all_gather = lambda row: torch.stack([row, row])
    runner.start(join(REQUESTS, OWNERS))
    assert (runner.finished(), runner.is_ahead) == ([], True)
    runner.start(plan(1))
    runner._pace.done = 3
    (report,) = runner.finished()
    assert (report.step, report.began, report.denoised) == (0, 1.0, 3.0)
    runner._pace.done = 6
    (report,) = runner.finished()
    assert (report.step, report.began, report.denoised) == (1, 4.0, 6.0)
    assert not runner.is_ahead


def test_no_image_is_made_of_a_last_step_that_failed_elsewhere():
    ranks = Ranks(DevicePace)
    unlucky_from(ranks, 1)
    ranks.start(join([toy_request("a cat", steps=2)], [(0, 1)]))
    ranks.start(plan(1, decodes=[Decode(0, 0)]))
    (decoded,) = [report for report in ranks.runners[0].side.take() if report.branch == DECODED]
    assert "another rank could not take its last step" in decoded.error


@pytest.mark.parametrize("fails", [False, True])
def test_the_first_step_waits_for_its_noise(fails):
    """The first step waits for noise that is drawn beside the steps."""
    prepared, waits = Future(), []
    runner = StepRunner(ToyPipeline(), 0, 1, lambda row: row.unsqueeze(0), InlineSideWork(0), DevicePace())
    runner.side.prepare = lambda run: runs.append(run) or prepared
    runs = []
    whole = join([toy_request(steps=9)])
    runner.start(plan(admit=whole.admit, encodes=whole.encodes, advance=False))

    def prepare(timeout=None):
        waits.append(timeout)
        if fails:
            raise ValueError("no noise")
        runs[0]()

    prepared.result = prepare
    assert runner.states[0].latents.numel() == 0
    runner.start(plan(1, assign=[Assign(0, (0, 0))]))
    runner.start(plan(2))
    failed = [id for report in runner.finished(wait=True) for id, _ in report.failed]
    assert waits == [None]
    assert failed == ([0] if fails else [])
    assert fails or runner.states[0].index == 2


def test_on_a_gpu_steps_go_before_side_work_and_what_that_made_is_theirs_too(monkeypatch):
    with fake_cuda():
        pace, side = CudaPace(DEVICE), SideThread("side", DEVICE, 0)
        assert (pace._stream.priority, side._stream.priority) == (-1, 0)
        recorded = []
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(stream))
        pace.hand_over(to_fake(torch.zeros(2)))
        pace.hand_over(torch.zeros(2))
        assert recorded == [pace._stream]
    side.close()
