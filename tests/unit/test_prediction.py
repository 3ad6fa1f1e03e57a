"""What a request is predicted to take, and that one which takes too long is refused, over HTTP and offline."""

import msgspec
import pytest

from tests.unit.edits import assert_refused
from tests.unit.fakes import INFO, LIMITS, VIDEO_INFO
from tests.unit.http_app import GENERATIONS, FakeEngine, make_app, send
from tests.unit.test_llm import engine as llm_engine  # noqa: F401  (a fixture)
from vllm_cfg_plugin.engine.calibration import Calibration, cost_from_ranks
from vllm_cfg_plugin.engine.cost import UNCALIBRATED, CostModel
from vllm_cfg_plugin.engine.prediction import predicted_seconds
from vllm_cfg_plugin.entrypoints.llm import DiffusionLLM
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, Guidance

SECOND = 1_000_000
COST = CostModel(
    step_us=SECOND,
    token_us=SECOND,
    square_us=0,
    encode_us=100 * SECOND,
    encode_token_us=0,
    decode_us=1000 * SECOND,
    decode_token_us=0,
)
# 64 image tokens of 10 seconds each: 640 a branch and step.
SLOW = msgspec.structs.replace(COST, step_us=0, token_us=10 * SECOND, encode_us=0, decode_us=0)


def request(branches=1, steps=10, interval=(0.0, 1.0)):
    """Of sequences of 4 tokens."""
    return DiffusionRequest(
        prompts=["a"] * branches,
        text_tokens=[1] * branches,
        image_tokens=3,
        height=8,
        width=8,
        num_inference_steps=steps,
        seed=0,
        guidance=Guidance(scale=4.0, interval=interval),
    )


@pytest.mark.parametrize(
    ("asked", "results", "ranks", "seconds"),
    [
        (request(), 1, 1, 100 + 10 * (1 + 4) + 1000),
        (request(), 1, 2, 100 + 10 * (1 + 4) + 1000),  # nothing to share
        (request(), 4, 1, 100 + 10 * (1 + 16) + 4000),
        (request(), 4, 2, 100 + 10 * (1 + 8) + 2000),
        (request(), 3, 2, 100 + 10 * (1 + 6) + 1500),
        (request(2), 1, 1, 200 + 10 * (1 + 8) + 1000),
        (request(2), 1, 2, 100 + 10 * (1 + 4) + 1000),
        (request(2, interval=(0.0, 0.4)), 1, 1, 200 + 4 * (1 + 8) + 6 * (1 + 4) + 1000),
        (request(2, steps=20), 5, 2, 100 + 20 * (1 + 20) + 2500),
    ],
)
def test_predicted_seconds(asked, results, ranks, seconds):
    assert predicted_seconds(asked, results, COST, ranks) == seconds


def test_a_noise_scheduler_that_forwards_twice_in_a_step():
    twice = msgspec.structs.replace(request(), num_timesteps=19)
    assert predicted_seconds(twice, 1, COST, 1) == 100 + 19 * 5 + 1000


@pytest.mark.parametrize("form", [lambda rank: rank, msgspec.to_builtins])
def test_the_slowest_rank_counts_however_the_answers_came(form):
    ranks = [
        Calibration(cost=msgspec.structs.replace(UNCALIBRATED, **costs), token_budget=9, default_tokens=16)
        for costs in ({"step_us": 5}, {"token_us": 7})
    ]
    cost = cost_from_ranks([form(rank) for rank in ranks])
    assert (cost.step_us, cost.token_us) == (5, 7)


@pytest.fixture
def engine():
    engine = FakeEngine()
    engine.calibration = Calibration(cost=SLOW, token_budget=9, default_tokens=16)
    return engine


TOO_LONG = {
    "steps": (INFO, {"num_inference_steps": 6}, "3900 s"),
    "size": (INFO, {"num_inference_steps": 2, "size": "128x128"}, "5140 s"),
    "n": (INFO, {"num_inference_steps": 2, "n": 3}, "n smaller"),
    "guidance": (INFO, {"num_inference_steps": 4, "negative_prompt": "b"}, "5200 s"),
    "video": (VIDEO_INFO, {"num_inference_steps": 2, "num_frames": 17, "guidance_scale": 1}, "fewer frames"),
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_what_takes_too_long_is_refused_over_http(engine, monkeypatch, case):
    info, fields, word = TOO_LONG[case]
    app = make_app(engine, monkeypatch, info)
    path = "/v1/videos" if info is VIDEO_INFO else GENERATIONS
    refused = send(app, path, json={"prompt": "a", **fields})
    assert_refused(
        refused, "num_inference_steps", "--max-request-seconds", "3600 s", "fewer, or the size smaller", word
    )
    assert engine.requests == {}
    assert app.state.videos_service.jobs.page(None, 10, "asc").data == []
    smaller = {"prompt": "a", "num_inference_steps": 2, "size": "64x64"} | (
        {"num_frames": 1} if info is VIDEO_INFO else {}
    )
    assert send(app, path, json=smaller).status_code == 200


def test_the_operator_sets_the_limit(engine, monkeypatch):
    app = make_app(engine, monkeypatch, limits=msgspec.structs.replace(LIMITS, max_request_seconds=1500))
    assert send(app, GENERATIONS, json={"prompt": "a", "num_inference_steps": 2}).status_code == 200
    assert_refused(
        send(app, GENERATIONS, json={"prompt": "a", "num_inference_steps": 3}), "num_inference_steps", "1500 s"
    )


def test_without_the_ranks_costs_nothing_is_refused_for_its_time(engine, monkeypatch, caplog):
    engine.calibration = 5
    app = make_app(engine, monkeypatch)
    assert send(app, GENERATIONS, json={"prompt": "a", "num_inference_steps": 50}).status_code == 200


def test_what_takes_too_long_is_refused_offline(llm_engine):  # noqa: F811
    llm_engine.cost = SLOW
    with DiffusionLLM("model") as llm:
        with pytest.raises(InvalidRequestError, match="max-request-seconds") as refused:
            llm.generate(["a", "a"], [DiffusionParams(num_inference_steps=steps) for steps in (2, 6)], use_tqdm=False)
        assert refused.value.param == "prompts[1].num_inference_steps"
        assert llm_engine.waiting == {}
        assert llm.generate("a", DiffusionParams(num_inference_steps=2), use_tqdm=False)[0].error is None
