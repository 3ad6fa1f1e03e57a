"""The wire format: what goes in comes out, and a busy step's plan is small."""

import msgspec

from vllm_cfg_plugin.engine import plan as wire
from vllm_cfg_plugin.engine.plan import Admission, Assign, Decode, Encode, SideReport, StepPlan, StepReport
from vllm_cfg_plugin.engine.step_result import merge_reports
from vllm_cfg_plugin.params import DiffusionRequest, Guidance


def request(**changes):
    fields = {
        "prompts": ["a rocket", " "],
        "text_tokens": [7, 6],
        "image_tokens": 64,
        "height": 64,
        "width": 64,
        "num_inference_steps": 20,
        "guidance": Guidance(scale=4.0),
        "seed": -(2**63),
    }
    return DiffusionRequest(**{**fields, **changes})


def test_a_plan_survives_the_wire():
    plan = StepPlan(7, [3], [Admission(9, request())], [Encode(9, 1, 0)], [Assign(8, (0, 1))], True, [Decode(2, 1)])
    assert wire.decode_plan(wire.encode(plan)) == plan


def test_a_side_report_survives_the_wire():
    report = SideReport(3, 1, 0, 12.5, "", (1, 64, 32, 3))
    assert wire.decode_side_report(wire.encode(report)) == report


def test_a_request_survives_vllms_pooling_parameters():
    original = request(seed=2**63 - 1, guidance_off="because")
    assert msgspec.convert(msgspec.to_builtins(original), DiffusionRequest) == original


def test_plans_are_small():
    """The plan of a steady batch is a few bytes and a change of all 32 owners below a kilobyte."""
    assert len(wire.encode(StepPlan(10**6, [], [], [], [], True, []))) <= 16
    assign = [Assign(10**6 + i, (1, 0)) for i in range(32)]
    assert len(wire.encode(StepPlan(10**6, list(range(10**6, 10**6 + 32)), [], [], assign, True, []))) < 1024


def test_an_empty_plan_says_so():
    assert StepPlan(0, [], [], [], [], False, []).is_empty()
    assert not StepPlan(0, [], [], [], [], True, []).is_empty()
    assert not StepPlan(0, [1], [], [], [], False, []).is_empty()
    assert not StepPlan(0, [], [], [], [], False, [Decode(1, 0)]).is_empty()


def test_reports_merge_into_the_whole_span_and_the_first_failure():
    a = StepReport(1, 0, 10.0, 11.0, [(6, "here")])
    b = StepReport(1, 1, 9.0, 12.0, [(6, "there"), (8, "too")])
    result = merge_reports([a, b], 0, [])
    assert (result.began, result.denoised, result.failed) == (9.0, 12.0, {6: "here", 8: "too"})
