"""vLLM's scheduler interface: admission, plans one step ahead, results, aborts, pauses."""

from types import SimpleNamespace

import msgspec
import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from tests.toy_pipeline import toy_request, toy_vllm_config
from vllm_cfg_plugin.engine.plan import DECODED, FORWARDED, KEPT, PREVIEWED, SideReport
from vllm_cfg_plugin.engine.progress import Preview, Progress, Queued
from vllm_cfg_plugin.engine.result import unpack_result
from vllm_cfg_plugin.engine.scheduler import StepScheduler
from vllm_cfg_plugin.engine.step_result import StepResult


def vllm_request(name, spec, client_index=0, trace_headers=None):
    extra = msgspec.to_builtins(spec) if not isinstance(spec, dict) else spec
    return SimpleNamespace(
        request_id=name,
        client_index=client_index,
        pooling_params=SimpleNamespace(extra_kwargs=extra),
        trace_headers=trace_headers,
    )


def make_scheduler(**config):
    return StepScheduler(toy_vllm_config(**config), log_stats=True)


def perfect_ranks(output):
    """What ranks that do everything at once report of a plan."""
    plan = output.planned.plan
    encoded = [(SideReport(e.id, e.branch, e.rank, 1.0), None) for e in plan.encodes]
    decoded = [(SideReport(d.id, DECODED, d.rank, 1.0, "", (1, 2, 2, 3)), memoryview(bytes(12))) for d in plan.decodes]
    forwarded = [(SideReport(f.id, FORWARDED, rank, 1.0), None) for f in plan.forwards for rank in set(f.owners)]
    return StepResult(began=1.0, denoised=2.0, side=encoded + decoded + forwarded)


def finish(scheduler, output, **failed):
    """Report a plan done (or failures by request id); the outputs that come of it."""
    result = perfect_ranks(output)
    result.failed = {int(id[1:]): why for id, why in failed.items()}
    by_client = scheduler.update_from_output(output, result)
    return [out for message in by_client.values() for out in message.outputs]


def encoded(scheduler):
    """Plan the next step and report its texts encoded, so that its requests run from the next one on."""
    output = scheduler.schedule()
    finish(scheduler, output)
    return output


def running_ids(output):
    return [request.id for request in output.planned.running]


def test_an_image_that_overtakes_the_report_of_its_last_step_has_taken_all_steps():
    """Ranks report a step each, and the one that decodes may be done before another has said so."""
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request(steps=2)))
    encoded(scheduler)
    first, last = scheduler.schedule(), scheduler.schedule()
    decode = last.planned.plan.decodes[0]
    image = (SideReport(decode.id, DECODED, decode.rank, 1.0, "", (1, 2, 2, 3)), memoryview(bytes(12)))
    by_client = scheduler.update_from_output(first, StepResult(began=1.0, denoised=2.0, side=[image]))
    (output,) = by_client[0].outputs
    assert unpack_result(output.pooling_output)[0].metrics.steps == 2


def test_a_request_that_ends_names_the_trace_that_it_is_part_of():
    scheduler, trace = make_scheduler(), {"traceparent": "00-1-2-01"}
    scheduler.add_request(vllm_request("a", toy_request(steps=1), trace_headers=trace))
    scheduler.add_request(vllm_request("b", toy_request(steps=1)))
    scheduler.add_request(vllm_request("c", toy_request(steps=9), trace_headers=trace))
    ended = []
    while len(ended) < 2:
        ended += finish(scheduler, scheduler.schedule())
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    ended += finish(scheduler, scheduler.schedule())
    assert {output.request_id: output.trace_headers for output in ended} == {"a": trace, "b": None, "c": trace}


def test_steps_are_planned_before_reports_come_back():
    """A request is planned to its last step before any report of a step comes back."""
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request(steps=3)))
    first = encoded(scheduler).planned.plan
    assert [a.request.prompts for a in first.admit] == [["a cat", ""]]
    assert [(e.branch, e.rank) for e in first.encodes] == [(0, 0), (1, 1)]
    assert not first.advance
    outputs = [scheduler.schedule() for _ in range(4)]
    plans = [output.planned.plan for output in outputs]
    assert [plan.advance for plan in plans] == [True, True, True, False]
    assert [[(a.id, a.owners) for a in plan.assign] for plan in plans] == [[(0, (0, 1))], [], [], []]
    assert [len(plan.decodes) for plan in plans] == [0, 0, 1, 0]
    assert outputs[3].awaits_side_work
    assert finish(scheduler, outputs[0]) == finish(scheduler, outputs[1]) == []
    (done,) = finish(scheduler, outputs[2])
    header, pixels = unpack_result(done.pooling_output)
    assert done.finish_reason == FinishReason.STOP
    assert pixels.shape == (1, 2, 2, 3)
    assert header.metrics.guided
    assert header.metrics.steps == 3
    assert not scheduler.has_requests()
    assert not scheduler.schedule().awaits_side_work


def test_progress_is_published_step_by_step_for_who_asked_for_it():
    scheduler, published = make_scheduler(), []
    scheduler._observers._progress = SimpleNamespace(publish=lambda *message: published.append(message))
    scheduler.add_request(vllm_request("a", msgspec.structs.replace(toy_request(steps=3), progress_key="bar")))
    scheduler.add_request(vllm_request("b", toy_request(steps=3)))
    encoded(scheduler)
    outputs = [scheduler.schedule() for _ in range(3)]  # all planned before the first is reported
    assert published == []
    for output in outputs:
        finish(scheduler, output)
    progress = [message for message in published if isinstance(message[1], Progress)]
    assert progress == [(0, Progress("bar", done, 3)) for done in (1, 2, 3)]


def test_who_waits_hears_once_a_second_how_many_came_before(monkeypatch):
    scheduler, published = make_scheduler(max_num_seqs=1), []
    scheduler._observers._progress = SimpleNamespace(publish=lambda *message: published.append(message))
    for name, key in (("a", ""), ("b", "second"), ("c", ""), ("d", "fourth")):
        scheduler.add_request(vllm_request(name, msgspec.structs.replace(toy_request(), progress_key=key)))
    for _ in range(3):
        scheduler.schedule()
    queued = [update for _, update in published if isinstance(update, Queued)]
    assert queued == [Queued("second", 0), Queued("fourth", 2)]


def test_a_preview_is_published_to_the_client_that_asked_for_it():
    scheduler, published = make_scheduler(), []
    scheduler._observers._progress = SimpleNamespace(publish=lambda *message: published.append(message))
    spec = msgspec.structs.replace(toy_request(steps=5), progress_key="bar", previews=1)
    scheduler.add_request(vllm_request("a", spec, client_index=1))
    encoded(scheduler)
    output = scheduler.schedule()
    (planned,) = output.planned.plan.previews
    report = SideReport(planned.id, PREVIEWED, planned.rank, 1.0, "", (1, 2, 2, 3))
    scheduler.update_from_output(output, StepResult(side=[(report, memoryview(bytes(12)))]))
    assert (1, Preview("bar", 0, (1, 2, 2, 3)), memoryview(bytes(12))) in published


def test_a_preview_that_could_not_be_made_fails_nobody():
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", msgspec.structs.replace(toy_request(steps=5), previews=1)))
    encoded(scheduler)
    output = scheduler.schedule()
    (planned,) = output.planned.plan.previews
    report = SideReport(planned.id, PREVIEWED, planned.rank, 0.0, "no luck")
    assert scheduler.update_from_output(output, StepResult(side=[(report, None)])) == {}
    assert scheduler.has_request("a")


def test_no_step_before_all_texts_are_encoded():
    """A request takes no step before all its texts are encoded."""
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request()))
    output = scheduler.schedule()
    for report in perfect_ranks(output).side:
        assert not scheduler.schedule().planned.plan.advance
        scheduler.update_from_output(output, StepResult(side=[report]))
    assert scheduler.schedule().planned.plan.advance


def test_a_text_that_can_t_be_encoded_fails_its_request():
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request()))
    output = scheduler.schedule()
    report = SideReport(0, 0, 0, 0.0, "no such words")
    (message,) = scheduler.update_from_output(output, StepResult(side=[(report, None)])).values()
    assert unpack_result(message.outputs[0].pooling_output)[0].error == "no such words"
    assert scheduler.schedule().planned.plan.retire == [0]
    assert not scheduler.has_requests()


def test_requests_join_at_any_step_and_leave_after_their_last():
    """Requests join at any step and leave after their own last."""
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request(steps=4)))
    encoded(scheduler)
    scheduler.schedule()
    scheduler.add_request(vllm_request("b", toy_request(steps=1, negative=None)))
    assert running_ids(encoded(scheduler)) == [0]
    output = scheduler.schedule()
    assert running_ids(output) == [0, 1]
    assert [d.id for d in output.planned.plan.decodes] == [1]
    assert running_ids(scheduler.schedule()) == [0]
    assert running_ids(scheduler.schedule()) == []


def test_max_num_seqs_limits_the_running_requests():
    scheduler = make_scheduler(max_num_seqs=2)
    for i in range(3):
        scheduler.add_request(vllm_request(str(i), toy_request()))
    encoded(scheduler)
    assert running_ids(scheduler.schedule()) == [0, 1]
    assert scheduler.get_request_counts() == (2, 1)


def test_max_num_batched_tokens_limits_the_heaviest_rank():
    scheduler = make_scheduler(max_num_batched_tokens=25)
    for i in range(4):
        scheduler.add_request(vllm_request(str(i), toy_request("12345", "12345", image_tokens=5, steps=2)))
    encoded(scheduler)
    assert [running_ids(scheduler.schedule()) for _ in range(2)] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("limit", [{"max_num_batched_tokens": 10}, {"max_step_ms": 1}])
def test_requests_too_large_for_a_step_keep_nobody_out(limit):
    """Requests too large for a step run one at a time and keep no small one out."""
    scheduler = make_scheduler(**limit)
    for name in ("huge", "huge too"):
        scheduler.add_request(vllm_request(name, toy_request(image_tokens=5000, steps=1)))
    scheduler.add_request(vllm_request("small", toy_request("x", steps=1)))
    encoded(scheduler)
    output = scheduler.schedule()
    assert running_ids(output) == [2]
    assert [forward.id for forward in output.planned.plan.forwards] == [0]
    finish(scheduler, output)
    output = scheduler.schedule()
    assert running_ids(output) == [0]
    assert [decode.id for decode in output.planned.plan.decodes] == [0]
    (done,) = finish(scheduler, output)
    assert unpack_result(done.pooling_output)[0].metrics.steps == 1
    assert [admission.id for admission in encoded(scheduler).planned.plan.admit] == [1]
    assert [forward.id for forward in scheduler.schedule().planned.plan.forwards] == [1]


def test_requests_without_guidance_are_spread_over_the_ranks():
    scheduler = make_scheduler()
    for i in range(4):
        scheduler.add_request(vllm_request(str(i), toy_request(negative=None)))
    encoded(scheduler)
    owners = [assign.owners[0] for assign in scheduler.schedule().planned.plan.assign]
    assert sorted(owners) == [0, 0, 1, 1]


def test_an_aborted_request_is_in_no_later_plan():
    """An aborted request is in no later plan and every rank is told."""
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add_request(vllm_request(name, toy_request(steps=9)))
    encoded(scheduler)
    scheduler.schedule()
    scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    output = scheduler.schedule()
    assert output.planned.plan.retire == [0]
    assert running_ids(output) == [1]


def test_aborting_the_last_request_tells_ranks_and_gauges():
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request()))
    scheduler.update_from_output(scheduler.schedule(), StepResult())
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert scheduler.has_requests()
    output = scheduler.schedule()
    assert output.planned.plan.retire == [0]
    (message,) = scheduler.update_from_output(output, StepResult()).values()
    assert message.scheduler_stats.num_running_reqs == 0
    assert not scheduler.has_requests()


def test_an_image_that_comes_after_the_abort_is_dropped():
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request(steps=1)))
    encoded(scheduler)
    output = scheduler.schedule()
    scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    assert finish(scheduler, output) == []
    assert not scheduler.schedule().awaits_side_work, "nobody waits for a decode that was cancelled"


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


def test_a_failed_request_is_answered_and_retired():
    """A failed request is answered with its message and retired."""
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add_request(vllm_request(name, toy_request(steps=4)))
    encoded(scheduler)
    first, second = scheduler.schedule(), scheduler.schedule()
    (failed,) = finish(scheduler, first, _0="no luck")
    assert failed.finish_reason == FinishReason.ERROR
    assert unpack_result(failed.pooling_output)[0].error == "no luck"
    assert finish(scheduler, second, _0="no luck") == []
    output = scheduler.schedule()
    assert output.planned.plan.retire == [0]
    assert running_ids(output) == [1]


def test_a_request_that_is_none_of_ours_stops_nothing():
    """A request that is none of ours is answered and stops nothing."""
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("odd", {"prompts": 3}))
    assert scheduler.has_requests()
    (answer,) = finish(scheduler, scheduler.schedule())
    assert "not a diffusion request" in unpack_result(answer.pooling_output)[0].error


BAD = {
    "text_tokens": {"text_tokens": [3]},
    "prompts": {"prompts": [], "text_tokens": []},
    "num_inference_steps": {"num_inference_steps": 0},
    "image_tokens": {"image_tokens": -1},
    "guidance_interval": {"guidance": {"scale": 4.0, "interval": [float("nan"), 1.0]}},
}


@pytest.mark.parametrize("field", BAD)
def test_a_request_that_can_t_be_planned_stops_nothing(field):
    """A request that can't be planned is answered and stops nothing."""
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("bad", msgspec.to_builtins(toy_request()) | BAD[field]))
    scheduler.add_request(vllm_request("good", toy_request(steps=1)))
    outputs = finish(scheduler, scheduler.schedule()) + finish(scheduler, scheduler.schedule())
    errors = {output.request_id: unpack_result(output.pooling_output)[0].error for output in outputs}
    assert field in errors["bad"]
    assert errors["good"] is None


def test_a_name_that_is_taken_is_refused_and_stops_nothing():
    scheduler = make_scheduler()
    for seed in (1, 2):
        scheduler.add_request(vllm_request("twin", toy_request(seed=seed, steps=1)))
    outputs = finish(scheduler, scheduler.schedule()) + finish(scheduler, scheduler.schedule())
    errors = [unpack_result(output.pooling_output)[0].error for output in outputs]
    assert "another request" in errors[0]
    assert errors[1:] == [None]
    assert not scheduler.has_requests()


def test_a_decode_counts_against_max_num_seqs():
    """A request whose image is still decoded counts against max num seqs."""
    scheduler = make_scheduler(max_num_seqs=1)
    for name in "ab":
        scheduler.add_request(vllm_request(name, toy_request(steps=1)))
    encoded(scheduler)
    last = scheduler.schedule()
    assert not scheduler.schedule().planned.admitted
    finish(scheduler, last)
    assert [request.request_id for request in scheduler.schedule().planned.admitted] == ["b"]


@pytest.mark.parametrize(("state", "running"), [(PauseState.PAUSED_NEW, [0]), (PauseState.PAUSED_ALL, [])])
def test_pausing_admits_nobody_and_steps_whom_it_should(state, running):
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request(steps=9)))
    encoded(scheduler)
    scheduler.schedule()
    scheduler.set_pause_state(state)
    scheduler.add_request(vllm_request("b", toy_request()))
    output = scheduler.schedule()
    assert running_ids(output) == running
    assert not output.planned.plan.admit
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert running_ids(encoded(scheduler)) == [0]
    assert running_ids(scheduler.schedule()) == [0, 1]


def test_has_request_knows_requests_until_they_leave():
    """Has request knows waiting and running requests until they leave."""
    scheduler = make_scheduler(max_num_seqs=1)
    for name in ("a", "b"):
        scheduler.add_request(vllm_request(name, toy_request()))
    scheduler.schedule()
    assert scheduler.has_request("a")
    assert scheduler.has_request("b")
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert not scheduler.has_request("a")
    assert not scheduler.has_request("never seen")


def lose(scheduler, output, epoch):
    """Report that ranks died over a plan, and were started for the `epoch`th time."""
    by_client = scheduler.update_from_output(output, StepResult(epoch=epoch, was_lost=True))
    return [out for message in by_client.values() for out in message.outputs]


def test_plans_that_the_ranks_lost_are_made_again_once():
    """Two plans were under way when a rank died; both are answered with the start that came after them."""
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add_request(vllm_request(name, toy_request(steps=3)))
    encoded(scheduler)
    lost = [scheduler.schedule(), scheduler.schedule()]
    assert lost[0].planned.plan.advance
    assert lose(scheduler, lost[0], epoch=1) == []
    again = scheduler.schedule()
    assert (again.epoch, [admission.id for admission in again.planned.plan.admit]) == (1, [0, 1])
    assert lose(scheduler, lost[1], epoch=1) == []
    assert scheduler.schedule().planned.plan.is_empty(), "the second one is no further death"
    result = perfect_ranks(again)
    result.epoch = 1
    scheduler.update_from_output(again, result)
    assert running_ids(scheduler.schedule()) == [0, 1]


def test_a_plan_that_came_too_late_for_its_ranks_blames_nobody():
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request()))
    scheduler.update_from_output(scheduler.schedule(), StepResult(epoch=1))  # the ranks had been started anew
    assert scheduler.batch.named("a").deaths == []


def test_a_request_that_kills_ranks_is_answered_with_that():
    """A request that the ranks died of alone is answered with that."""
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request()))
    for epoch in (1, 2):
        assert lose(scheduler, scheduler.schedule(), epoch) == []
    (output,) = lose(scheduler, scheduler.schedule(), epoch=3)
    assert "died 3 times while they worked on it" in unpack_result(output.pooling_output)[0].error
    assert not scheduler.has_requests()


def test_the_executor_is_told_when_ranks_may_die_of_a_request():
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add_request(vllm_request(name, toy_request()))
    for epoch in (1, 2):
        assert not scheduler.schedule().is_trial
        lose(scheduler, scheduler.schedule(), epoch)
    assert scheduler.schedule().is_trial


def test_a_kept_request_goes_on_to_its_end():
    """A kept request goes on from there and no further than its end."""
    scheduler = make_scheduler()
    scheduler.add_request(vllm_request("a", toy_request(steps=4)))
    encoded(scheduler)
    output = scheduler.schedule()
    kept = StepResult(side=[(SideReport(0, KEPT, 0, 0.0, "", (2,)), memoryview(b"latents"))])
    scheduler.update_from_output(output, kept)
    assert lose(scheduler, scheduler.schedule(), epoch=1) == []
    again = scheduler.schedule()
    assert [admission.kept for admission in again.planned.plan.admit] == [b"latents"]
    result = perfect_ranks(again)
    result.epoch = 1
    scheduler.update_from_output(again, result)
    plans = [scheduler.schedule().planned.plan for _ in range(3)]
    assert [plan.advance for plan in plans] == [True, True, False]
    assert [len(plan.decodes) for plan in plans] == [0, 1, 0]
