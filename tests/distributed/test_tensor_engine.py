"""The engine's steps with cfg ranks that share weights: one request's latents in any batch, whoever fails."""

import pytest
import torch

from tests.distributed.engine_ranks import run_ranks
from tests.distributed.test_engine import (
    MAX_TOKENS,
    bitwise_equal,
    make_requests,
    one_failure_costs_one_request,
)
from tests.model_builders.qwen_image import build_qwen_image

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_qwen_image(tmp_path_factory.mktemp("model") / "small", size="small")


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """Each request's latents after every step, on two processes that share weights and have nothing else to do."""
    scripts = {str(request.seed): [(0, request)] for request in make_requests(model)}
    traces = run_ranks(model, 1, scripts, tmp_path_factory.mktemp("traces"), tensor=2)[0]
    return {seed: trace for of_script in traces.values() for seed, trace in of_script.items()}


def test_latents_are_those_of_one_process(model, alone, tmp_path):
    script = {"mixed": [(0, request) for request in make_requests(model)]}
    for seed, expected in run_ranks(model, 1, script, tmp_path)[0]["mixed"].items():
        for one, other in zip(expected, alone[seed], strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("ranks", "rows", "budget"), [(2, 1, 1_000_000), (2, 1, MAX_TOKENS), (2, 2, 1_000_000)], ids=str
)
def test_latents_are_bitwise_those_of_a_request_alone(model, alone, tmp_path, ranks, rows, budget):
    script = {"mixed": [(i // 2, request) for i, request in enumerate(make_requests(model))]}
    for process in run_ranks(model, ranks, script, tmp_path, max_tokens=budget, sharers=rows, tensor=2):
        assert process["mixed"].keys() == alone.keys()
        assert all(bitwise_equal(trace, alone[seed]) for seed, trace in process["mixed"].items())


def test_as_on_gpus_too(model, alone, tmp_path):
    """Over process groups, where ranks learn of a failure a step later."""
    script = {"mixed": [(i // 2, request) for i, request in enumerate(make_requests(model))]}
    for process in run_ranks(model, 2, script, tmp_path, tensor=2, as_on_gpus=True):
        assert all(bitwise_equal(trace, alone[seed]) for seed, trace in process["mixed"].items())


@pytest.mark.parametrize("budget", [1_000_000, MAX_TOKENS])
def test_a_process_that_fails_alone_costs_one_request(model, alone, tmp_path, budget):
    one_failure_costs_one_request(model, alone, tmp_path, max_tokens=budget, tensor=2)
