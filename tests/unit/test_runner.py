"""The step loop on one rank: requests join and leave, and one request's failure is its own."""

import pytest
import torch

from tests.toy_pipeline import ToyPipeline, toy_request
from vllm_cfg_plugin.engine.plan import Admission, Decode, Forward, StepPlan
from vllm_cfg_plugin.worker.runner import StepRunner
from vllm_cfg_plugin.worker.state import EmbeddingCache


@pytest.fixture
def pipeline():
    return ToyPipeline()


@pytest.fixture
def runner(pipeline):
    return StepRunner(pipeline, 0, 1, lambda row: row.unsqueeze(0))


def run_to_the_end(runner, requests, step=0):
    """All requests from their first step to their image; the last report."""
    steps = requests[0].num_inference_steps
    report = None
    for index in range(steps):
        last = index == steps - 1
        plan = StepPlan(
            step + index,
            [],
            [Admission(id, request) for id, request in enumerate(requests)] if index == 0 else [],
            [Forward(id, index, (0,) * len(request.prompts)) for id, request in enumerate(requests)],
            [Decode(id, 0) for id in range(len(requests))] if last else [],
        )
        report, _ = runner.run(plan)
    return report


def test_a_request_runs_from_noise_to_image_and_is_forgotten(runner):
    report = run_to_the_end(runner, [toy_request()])
    assert [image.id for image in report.images] == [0]
    assert not report.failed
    assert not runner.states


def test_a_prompt_is_encoded_once_however_many_requests_bring_it(runner, pipeline):
    run_to_the_end(runner, [toy_request("a cat"), toy_request("a dog"), toy_request("a cat", seed=5)])
    assert sorted(pipeline.encoded) == ["", "a cat", "a dog"]


def test_a_rank_encodes_only_its_own_branches(pipeline):
    runner = StepRunner(pipeline, 1, 2, lambda row: torch.stack([row, row]))
    runner.run(StepPlan(0, [], [Admission(0, toy_request("a cat", "blurry"))], [Forward(0, 0, (0, 1))], []))
    assert pipeline.encoded == ["blurry"]


def test_a_retired_request_leaves_nothing_behind(runner):
    runner.run(StepPlan(0, [], [Admission(0, toy_request())], [Forward(0, 0, (0, 0))], []))
    runner.run(StepPlan(1, [0], [], [], []))
    assert not runner.states


def latents_after_one_step(requests, fail=None):
    pipeline = ToyPipeline()
    if fail is not None:
        pipeline.transformer.fail = fail
    runner = StepRunner(pipeline, 0, 1, lambda row: row.unsqueeze(0))
    forwards = [Forward(id, 0, (0,) * len(request.prompts)) for id, request in enumerate(requests)]
    report, _ = runner.run(StepPlan(0, [], [Admission(id, r) for id, r in enumerate(requests)], forwards, []))
    return report, {id: state.latents for id, state in runner.states.items()}


def test_a_failing_text_encoder_fails_its_request_alone():
    requests = [toy_request("a cat"), toy_request("unencodable"), toy_request("a dog")]
    report, latents = latents_after_one_step(requests)
    assert [id for id, _ in report.failed] == [1]
    assert "no such words" in report.failed[0][1]
    assert torch.equal(latents[0], latents_after_one_step([requests[0]])[1][0])
    assert torch.equal(latents[2], latents_after_one_step([requests[2]])[1][0])


def test_a_failing_sequence_is_found_and_fails_its_request_alone():
    def fail(sequences):
        if any(sequence.latents.shape[1] == 9 for sequence in sequences):
            raise ValueError("nine is unlucky")

    requests = [toy_request("a cat"), toy_request("bad", image_tokens=9), toy_request("a dog")]
    report, latents = latents_after_one_step(requests, fail)
    assert [id for id, _ in report.failed] == [1]
    assert torch.equal(latents[0], latents_after_one_step([requests[0]])[1][0])
    assert torch.equal(latents[2], latents_after_one_step([requests[2]])[1][0])


def test_a_batch_that_runs_out_of_memory_is_split_and_nobody_fails():
    sizes = []

    def fail(sequences):
        sizes.append(len(sequences))
        if len(sequences) > 2:
            raise torch.OutOfMemoryError("too many")

    requests = [toy_request(f"cat {i}", seed=i) for i in range(4)]
    report, latents = latents_after_one_step(requests, fail)
    assert not report.failed
    assert max(sizes) == 8
    for id, request in enumerate(requests):
        assert torch.equal(latents[id], latents_after_one_step([request])[1][0])


def test_a_failed_request_stays_failed_until_it_is_retired(runner):
    runner.run(StepPlan(0, [], [Admission(0, toy_request("unencodable"))], [Forward(0, 0, (0, 0))], []))
    report, _ = runner.run(StepPlan(1, [], [], [Forward(0, 1, (0, 0))], []))
    assert [id for id, _ in report.failed] == [0]
    report, _ = runner.run(StepPlan(2, [0], [], [], []))
    assert report.failed == []


def test_latents_that_are_not_finite_are_an_error_and_no_black_picture(runner, pipeline):
    pipeline.draw_noise = lambda request: torch.full((1, 4, 4), float("nan"))
    report = run_to_the_end(runner, [toy_request()])
    assert not report.images
    assert "not finite" in report.failed[0][1]


def test_overridden_hooks_act_in_the_engine():
    class Loud(ToyPipeline):
        def predict_noise(self, **kwargs):
            return 2 * super().predict_noise(**kwargs)

        def scheduler_step(self, noise_pred, t, latents):
            return super().scheduler_step(noise_pred, t, latents) + 1

    runner = StepRunner(Loud(), 0, 1, lambda row: row.unsqueeze(0))
    request = toy_request(negative=None)
    runner.run(StepPlan(0, [], [Admission(0, request)], [Forward(0, 0, (0,))], []))
    noise = ToyPipeline().draw_noise(request)
    expected = noise - 0.1 * (2 * (noise * 1 + float(len("a cat")))) + 1
    assert torch.allclose(runner.states[0].latents, expected)


def test_the_cache_forgets_the_least_recently_used_embedding():
    encoded = []

    def encode(prompt):
        encoded.append(prompt)
        return torch.zeros(4)  # 16 bytes

    cache = EmbeddingCache(encode, capacity_bytes=32)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        cache.get(prompt)
    assert encoded == ["a", "b", "c", "b"]
