"""The wire format: what goes in comes out, and a busy step's plan is small."""

import msgspec

from vllm_cfg_plugin.engine import plan as wire
from vllm_cfg_plugin.engine.plan import Admission, Decode, DecodedImage, Forward, StepPlan, StepReport
from vllm_cfg_plugin.engine.step_result import merge_reports
from vllm_cfg_plugin.params import DiffusionRequest


def request(**changes):
    fields = {
        "prompts": ["a rocket", " "],
        "text_tokens": [7, 6],
        "image_tokens": 64,
        "height": 64,
        "width": 64,
        "num_inference_steps": 20,
        "true_cfg_scale": 4.0,
        "seed": -(2**63),
    }
    return DiffusionRequest(**{**fields, **changes})


def test_a_plan_survives_the_wire():
    plan = StepPlan(7, [3], [Admission(9, request())], [Forward(9, 0, (0, 1))], [Decode(2, 1)])
    assert wire.decode_plan(wire.encode(plan)) == plan


def test_a_request_survives_vllms_pooling_parameters():
    original = request(seed=2**63 - 1, guidance_off="because")
    assert msgspec.convert(msgspec.to_builtins(original), DiffusionRequest) == original


def test_a_plan_for_32_running_requests_is_under_2_kilobytes():
    forwards = [Forward(1_000_000 + i, 150, (0, 1)) for i in range(32)]
    decodes = [Decode(1_000_000 + i, i % 2) for i in range(32)]
    assert len(wire.encode(StepPlan(10**6, list(range(10**6, 10**6 + 32)), [], forwards, decodes))) < 2048


def test_an_empty_plan_says_so():
    assert StepPlan(0, [], [], [], []).is_empty()
    assert not StepPlan(0, [1], [], [], []).is_empty()
    assert not StepPlan(0, [], [], [], [Decode(1, 0)]).is_empty()


def test_reports_merge_into_the_slowest_encode_the_first_failure_and_all_images():
    a = StepReport(1, 0, 10.0, 11.0, [(4, 3.0)], [(6, "here")], [DecodedImage(5, 1, 2, 0.5)])
    b = StepReport(1, 1, 9.0, 12.0, [(4, 5.0)], [(6, "there")], [DecodedImage(8, 1, 1, 0.5)])
    result = merge_reports([(a, [memoryview(b"abcdef")]), (b, [memoryview(b"xyz")])])
    assert (result.began, result.denoised, result.encode_ms, result.failed) == (9.0, 12.0, {4: 5.0}, {6: "here"})
    assert [(image.id, bytes(pixels)) for image, pixels in result.images] == [(5, b"abcdef"), (8, b"xyz")]
