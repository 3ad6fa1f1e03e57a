"""vLLM's scheduler interface: admission, plans one step ahead, results, aborts, pauses."""

from types import SimpleNamespace

import msgspec
import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from tests.toy_pipeline import toy_request, toy_vllm_config
from vllm_cfg_plugin.engine.plan import DecodedImage
from vllm_cfg_plugin.engine.result import unpack_result
from vllm_cfg_plugin.engine.scheduler import StepScheduler
from vllm_cfg_plugin.engine.step_result import StepResult


def vllm_request(name, spec, client_index=0):
    extra = msgspec.to_builtins(spec) if not isinstance(spec, dict) else spec
    return SimpleNamespace(
        request_id=name, client_index=client_index, pooling_params=SimpleNamespace(extra_kwargs=extra)
    )


def make_scheduler(**config):
    return StepScheduler(toy_vllm_config(**config), log_stats=True)


def finish(scheduler, output, **failed):
    """What perfect ranks report of a plan (or failures by request id)."""
    images = [(DecodedImage(d.id, 2, 2, 1.0), memoryview(bytes(12))) for d in output.plan.decodes]
    result = StepResult(began=1.0, denoised=2.0, failed={int(id[1:]): why for id, why in failed.items()}, images=images)
    by_client = scheduler.update_from_output(output, result)
    return [out for message in by_client.values() for out in message.outputs]


def test_a_request_is_planned_to_its_last_step_before_any_report_comes_back():
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request(steps=3)))
    outputs = [scheduler.schedule() for _ in range(4)]
    assert [[f.index for f in o.plan.forwards] for o in outputs] == [[0], [1], [2], []]
    assert [a.request.prompts for a in outputs[0].plan.admit] == [["a cat", ""]]
    assert [len(o.plan.decodes) for o in outputs] == [0, 0, 1, 0]
    assert outputs[3].plan.is_empty()
    assert outputs[3].total_num_scheduled_tokens == 0
    assert finish(scheduler, outputs[0]) == []
    (done,) = finish(scheduler, outputs[2])
    header, pixels = unpack_result(done.pooling_output)
    assert done.finish_reason == FinishReason.STOP
    assert pixels.shape == (2, 2, 3)
    assert header.metrics.guided
    assert not scheduler.has_requests()


def test_requests_join_at_any_step_and_leave_after_their_own_last():
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request(steps=3)))
    scheduler.schedule()
    scheduler.add_request(vllm_request("b", toy_request(steps=1, negative=None)))
    plan = scheduler.schedule().plan
    assert [(f.id, f.index) for f in plan.forwards] == [(0, 1), (1, 0)]
    assert [d.id for d in plan.decodes] == [1]
    assert [f.id for f in scheduler.schedule().plan.forwards] == [0]


def test_max_num_seqs_limits_the_running_requests():
    scheduler = make_scheduler(max_num_seqs=2)
    for i in range(3):
        scheduler.add_request(vllm_request(str(i), toy_request()))
    assert len(scheduler.schedule().plan.forwards) == 2
    assert scheduler.get_request_counts() == (2, 1)


def test_max_num_batched_tokens_limits_the_heaviest_rank_first_come_first_served():
    scheduler = make_scheduler(max_num_batched_tokens=25)
    for i in range(4):
        scheduler.add_request(vllm_request(str(i), toy_request("12345", "12345", image_tokens=5, steps=2)))
    assert [len(scheduler.schedule().plan.forwards) for _ in range(4)] == [2, 2, 2, 2]


def test_a_request_larger_than_the_token_budget_runs_alone_instead_of_never():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add_request(vllm_request("huge", toy_request(image_tokens=5000, steps=1)))
    scheduler.add_request(vllm_request("small", toy_request(steps=1)))
    assert [[f.id for f in scheduler.schedule().plan.forwards] for _ in range(2)] == [[0], [1]]


def test_the_rank_of_a_request_without_guidance_is_the_idle_one():
    scheduler = make_scheduler()
    for i in range(4):
        scheduler.add_request(vllm_request(str(i), toy_request(negative=None)))
    owners = [f.owners for f in scheduler.schedule().plan.forwards]
    assert owners == [(0,), (1,), (0,), (1,)]


def test_an_aborted_request_is_in_no_later_plan_and_every_rank_is_told():
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add_request(vllm_request(name, toy_request(steps=9)))
    scheduler.schedule()
    scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    plan = scheduler.schedule().plan
    assert plan.retire == [0]
    assert [f.id for f in plan.forwards] == [1]


def test_aborting_the_last_request_still_tells_the_ranks_and_the_gauges():
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request()))
    scheduler.update_from_output(scheduler.schedule(), StepResult())
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert scheduler.has_requests()
    output = scheduler.schedule()
    assert output.plan.retire == [0]
    (message,) = scheduler.update_from_output(output, StepResult()).values()
    assert message.scheduler_stats.num_running_reqs == 0
    assert not scheduler.has_requests()


def test_an_image_that_comes_after_the_abort_is_dropped():
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request(steps=1)))
    output = scheduler.schedule()
    scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    assert finish(scheduler, output) == []


def test_aborting_all_answers_every_client_with_an_empty_tensor():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add_request(vllm_request("running", toy_request(), client_index=0))
    scheduler.add_request(vllm_request("waiting", toy_request(), client_index=1))
    output = scheduler.schedule()
    assert scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED) == []
    messages = scheduler.update_from_output(output, StepResult())
    assert {i: [o.request_id for o in m.outputs] for i, m in messages.items()} == {0: ["running"], 1: ["waiting"]}
    for message in messages.values():
        assert message.outputs[0].finish_reason == FinishReason.ABORT
        assert message.outputs[0].pooling_output.numel() == 0


def test_a_failed_request_is_answered_with_its_message_and_retired():
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add_request(vllm_request(name, toy_request(steps=4)))
    first, second = scheduler.schedule(), scheduler.schedule()
    (failed,) = finish(scheduler, first, _0="no luck")
    assert failed.finish_reason == FinishReason.ERROR
    assert unpack_result(failed.pooling_output)[0].error == "no luck"
    assert finish(scheduler, second, _0="no luck") == []
    plan = scheduler.schedule().plan
    assert plan.retire == [0]
    assert [f.id for f in plan.forwards] == [1]


def test_a_request_that_is_none_of_ours_is_answered_and_stops_nothing():
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("odd", {"prompts": 3}))
    assert scheduler.has_requests()
    (answer,) = finish(scheduler, scheduler.schedule())
    assert "not a diffusion request" in unpack_result(answer.pooling_output)[0].error


@pytest.mark.parametrize(("state", "running", "joined"), [(PauseState.PAUSED_NEW, 1, 0), (PauseState.PAUSED_ALL, 0, 0)])
def test_pausing_admits_nobody_and_steps_whom_it_should(state, running, joined):
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request(steps=9)))
    scheduler.schedule()
    scheduler.set_pause_state(state)
    scheduler.add_request(vllm_request("b", toy_request()))
    plan = scheduler.schedule().plan
    assert (len(plan.forwards), len(plan.admit)) == (running, joined)
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert [f.id for f in scheduler.schedule().plan.forwards] == [0, 1]
