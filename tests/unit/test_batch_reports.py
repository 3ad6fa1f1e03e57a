"""What a batch makes of the ranks' reports, what is left of requests that have gone, and whom the budget lets in."""

import pytest

from tests.toy_pipeline import toy_request
from vllm_cfg_plugin.engine.batching import StepBatch
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.plan import DECODED, SideReport, StepReport
from vllm_cfg_plugin.engine.step_result import StepResult, merge_reports


@pytest.fixture
def batch():
    times = iter(range(100, 200))
    return StepBatch(1, 8, 10**6, UNCALIBRATED, clock=lambda: float(next(times)))


def admit(batch, name, **fields):
    """A request of one branch, prepared and encoded; its text took 7 ms."""
    request = batch.add(name, 0, toy_request(negative=None, **fields))
    batch.note_result(batch.next_plan(), StepResult())
    assert batch.note_side_report(SideReport(request.id, 0, 0, 7.0)) is request
    return request


def step(batch, began, denoised, failed=()):
    planned = batch.next_plan()
    assert planned.plan.advance
    batch.note_result(planned, StepResult(began=began, denoised=denoised, failed=dict.fromkeys(failed, "no")))
    return planned


def test_a_requests_figures_are_those_of_its_own_steps_and_texts(batch):
    request = admit(batch, "a", steps=3)
    batch.note_side_report(SideReport(request.id, 0, 0, 3.0))  # another rank had it cached
    step(batch, 110.0, 111.0)
    first = request.metrics(now=150.0)
    assert (first.queue_ms, first.encode_ms, first.denoise_ms, first.steps) == (1000.0, 7.0, 1000.0, 1)
    step(batch, 120.0, 125.0)
    batch.note_side_report(SideReport(request.id, DECODED, 0, 90.0))
    later = request.metrics(now=150.0, decode_ms=90.0)
    assert (later.encode_ms, later.denoise_ms, later.decode_ms, later.steps) == (7.0, 15_000.0, 90.0, 2)
    step(batch, 130.0, 140.0, failed=[request.id])
    assert request.metrics(now=150.0).steps == 2, "a step that failed is not done"


def test_steps_are_counted_from_a_requests_own_first(batch):
    early = admit(batch, "early", steps=9)
    step(batch, 1.0, 2.0)
    late = admit(batch, "late", steps=9)
    done = early.done_steps
    step(batch, 3.0, 4.0)
    assert (early.done_steps, late.done_steps) == (done + 1, 1)


def test_side_work_is_awaited_until_it_is_reported(batch):
    batch.add("a", 0, toy_request(steps=1, negative=None))
    assert not batch.awaits_side_work
    batch.note_result(batch.next_plan(), StepResult())
    assert batch.awaits_side_work
    batch.note_side_report(SideReport(0, 0, 0, 1.0))
    assert not batch.awaits_side_work
    step(batch, 1.0, 2.0)
    assert batch.awaits_side_work


def test_the_late_report_of_who_was_taken_out_is_nobodys(batch):
    """A request that is taken out is awaited no more and its late report is nobody's."""
    request = batch.add("a", 0, toy_request(negative=None))
    batch.next_plan()
    batch.take_out(request)
    assert not batch.awaits_side_work
    assert batch.note_side_report(SideReport(request.id, 0, 0, 1.0)) is None


def test_a_text_whose_encode_failed_is_not_held(batch):
    request = batch.add("a", 0, toy_request(negative=None))
    batch.note_result(batch.next_plan(), StepResult())
    assert batch.note_side_report(SideReport(request.id, 0, 0, 1.0, "no such words")) is request
    assert not batch.next_plan().plan.advance


def test_nothing_is_left_of_a_request_whose_image_is_here(batch):
    request = admit(batch, "a", steps=1)
    step(batch, 1.0, 2.0)
    assert batch.draining
    batch.finish(request)
    assert not any((batch.draining, batch.stepping.running, batch.stepping.preparing, batch.waiting, len(batch)))
    assert batch.known(request.id) is None
    assert batch.named("a") is None


def test_nobody_joins_a_paused_batch(batch):
    batch.add("a", 0, toy_request())
    assert batch.next_plan(step=False).admitted == []
    assert batch.next_plan(admit=False).admitted == []
    assert len(batch.next_plan().admitted) == 1


def test_a_name_is_given_once(batch):
    batch.add("a", 0, toy_request())
    with pytest.raises(ValueError, match="request_id='a' is the name of another request"):
        batch.add("a", 0, toy_request())


@pytest.mark.parametrize(
    ("ranks", "tokens", "join"),
    [
        (1, [50, 50], 2),
        (1, [50, 51], 1),
        (1, [100, 1], 1),
        (2, [90, 90, 10], 3),
        (2, [90, 90, 20], 2),
    ],
)
def test_requests_join_within_every_ranks_token_budget(ranks, tokens, join):
    """Requests join as long as no rank has more than the token budget."""
    batch = StepBatch(ranks, 8, 100, UNCALIBRATED)
    for number, each in enumerate(tokens):
        batch.add(str(number), 0, toy_request("", None, image_tokens=each))
    assert len(batch.next_plan().admitted) == join


@pytest.mark.parametrize("sizes", [(5000, 40, 40), (40, 40, 5000)])
def test_a_request_above_the_token_budget_keeps_nobody_out(sizes):
    """A request larger than the token budget keeps no smaller ones out and joins them."""
    batch = StepBatch(1, 8, 100, UNCALIBRATED)
    for number, tokens in enumerate(sizes):
        batch.add(str(number), 0, toy_request(negative=None, image_tokens=tokens))
        batch.next_plan()
    assert len(batch.stepping.preparing) == 3


def test_the_processes_of_a_rank_have_one_span():
    times = ((0, 2.0, 5.0), (0, 1.0, 4.0), (1, 3.0, 6.0))
    reports = [StepReport(7, rank, began, denoised, []) for rank, began, denoised in times]
    assert merge_reports(reports, 0, []).spans == [(1.0, 5.0), (3.0, 6.0)]
