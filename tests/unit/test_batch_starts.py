"""Who starts when: an idle batch waits for texts that are on their way, a running one for nobody; told once."""

import pytest

from tests.toy_pipeline import toy_request
from vllm_cfg_plugin.engine.batching import StepBatch
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.plan import SideReport
from vllm_cfg_plugin.engine.step_result import StepResult


@pytest.fixture
def batch():
    return StepBatch(1, 8, 10**6, UNCALIBRATED)


def add(batch, *names, steps=9):
    """Requests of one branch that all ranks have prepared, their texts still to be encoded; returns their ids."""
    ids = [batch.add(name, 0, toy_request(negative=None, steps=steps)).id for name in names]
    batch.note_result(batch.next_plan(), StepResult())
    return ids


def encoded(batch, *ids):
    for id in ids:
        batch.note_side_report(SideReport(id, 0, 0, 1.0))


def started(batch):
    return [assign.id for assign in batch.next_plan().plan.assign]


def test_an_idle_batch_waits_for_who_came_before_it_starts(batch):
    """An idle batch waits for all that came before its first is ready."""
    (first,), (second,) = add(batch, "first"), add(batch, "second")
    encoded(batch, first)
    assert started(batch) == []
    encoded(batch, second)
    assert started(batch) == [first, second]


def test_a_batch_that_is_idle_again_waits_again(batch):
    (before,) = add(batch, "before", steps=1)
    encoded(batch, before)
    assert started(batch) == [before]
    batch.finish(batch.named("before"))
    first, second = add(batch, "first", "second")
    encoded(batch, first)
    assert started(batch) == []
    encoded(batch, second)
    assert started(batch) == [first, second]


def test_a_running_batch_takes_in_who_is_ready_once(batch):
    """A running batch takes in who is ready and tells nobody twice."""
    (running,) = add(batch, "running")
    encoded(batch, running)
    assert started(batch) == [running]
    first, second = add(batch, "first", "second")
    encoded(batch, second)
    assert started(batch) == [second]
    encoded(batch, first)
    assert started(batch) == [first]
    assert started(batch) == []


def test_room_is_free_after_a_last_step_not_after_its_decode():
    """Who waited for room joins after the last step of another and not only after its decode."""
    batch = StepBatch(1, 8, 100, UNCALIBRATED)
    ids = [batch.add(name, 0, toy_request("", None, image_tokens=80, steps=1)).id for name in ("first", "second")]
    admitting = batch.next_plan()
    assert [request.id for request in admitting.admitted] == ids[:1]
    batch.note_result(admitting, StepResult())
    encoded(batch, ids[0])
    assert [decode.id for decode in batch.next_plan().plan.decodes] == ids[:1]
    assert [request.id for request in batch.next_plan().admitted] == ids[1:]
