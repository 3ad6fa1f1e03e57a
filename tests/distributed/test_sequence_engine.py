"""The engine's steps with cfg ranks of two processes each: the latents of one process, whoever fails or leaves."""

import os
import time

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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_qwen_image(tmp_path_factory.mktemp("model") / "small", size="small")


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """Each request's latents after every step, on one process."""
    script = {"mixed": [(0, request) for request in make_requests(model)]}
    return run_ranks(model, 1, script, tmp_path_factory.mktemp("traces"))[0]["mixed"]


@pytest.mark.parametrize(("ranks", "budget"), [(1, 1_000_000), (2, 1_000_000), (2, MAX_TOKENS)])
def test_latents_are_bitwise_those_of_one_process(model, expected, tmp_path, ranks, budget):
    script = {"mixed": [(i // 2, request) for i, request in enumerate(make_requests(model))]}
    for process in run_ranks(model, ranks, script, tmp_path, max_tokens=budget, sharers=2):
        assert process["mixed"].keys() == expected.keys()
        assert all(bitwise_equal(trace, expected[seed]) for seed, trace in process["mixed"].items())


@pytest.mark.parametrize("budget", [1_000_000, MAX_TOKENS])
def test_a_process_that_fails_alone_costs_one_request(model, expected, tmp_path, budget):
    one_failure_costs_one_request(model, expected, tmp_path, max_tokens=budget, sharers=2)


def test_as_on_gpus_too(model, expected, tmp_path):
    """Over process groups, where ranks learn of a failure a step later."""
    script = {"mixed": [(i // 2, request) for i, request in enumerate(make_requests(model))]}
    for process in run_ranks(model, 2, script, tmp_path, sharers=2, as_on_gpus=True):
        assert process["mixed"].keys() == expected.keys()
        assert all(bitwise_equal(trace, expected[seed]) for seed, trace in process["mixed"].items())


def test_an_aborted_long_request_leaves_a_group_that_works(model, expected, tmp_path):
    requests = make_requests(model)
    small, victim, successor = requests[1], requests[2], requests[4]

    def endless(process, branches):
        """The victim's forwards end only with their cancellation, or with their process."""
        if any(branch.request == victim for branch in branches):
            ends = time.monotonic() + 60
            while time.monotonic() < ends:
                torch.zeros(1)
            os._exit(1)

    script = {"abort": [(0, victim), (0, small), (12, victim.seed), (13, successor)]}
    for process in run_ranks(model, 2, script, tmp_path, endless, max_tokens=MAX_TOKENS, sharers=2):
        assert sorted(process["abort"]) == sorted((small.seed, successor.seed))
        assert all(bitwise_equal(trace, expected[seed]) for seed, trace in process["abort"].items())
