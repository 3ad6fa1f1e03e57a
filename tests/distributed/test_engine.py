"""Invariants 1 and 2 on real gloo ranks and a random-weight Qwen-Image: the image depends on its request alone.

Same requests on 1, 2 and 3 ranks, alone and with seven others that join at random steps: bitwise equal latents after
every step, on every rank, and equal to diffusers' own pipeline to 1e-4.
"""

import os
import random
import time

import pytest
import torch
from diffusers import QwenImagePipeline

from tests.distributed.engine_ranks import run_ranks
from tests.model_builders.qwen_image import build_qwen_image
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.params import DiffusionParams, RequestLimits
from vllm_cfg_plugin.pipelines.registry import describe
from vllm_cfg_plugin.resolve import resolve_requests
from vllm_cfg_plugin.tokens import TokenCounter

pytestmark = pytest.mark.distributed

STEPS = 8
# (prompt, negative prompt, height, width, steps, scale): mixed lengths, sizes, step counts and scales; two unguided.
ASKED = [
    ("a red apple on a blue background", " ", 64, 64, STEPS, 4.0),
    ("cat", "", 32, 32, STEPS, 2.5),
    ("grinning face, white background, with a very long description that goes on and on", "ugly", 128, 64, STEPS, 7.0),
    ("a rocket on a black background", None, 64, 64, STEPS, 4.0),
    ("pizza", " ", 96, 160, 5, 3.0),
    ("a dog face on a green background", "blurry, low quality, and many more words of no use", 64, 64, 11, 1.5),
    ("x", None, 48, 16, 3, 1.0),
    ("a panda on a pink background", " ", 64, 96, STEPS, 4.0),
]


def make_requests(model):
    checkpoint = Checkpoint(str(model))
    info = describe(checkpoint)
    count_tokens = TokenCounter.of(checkpoint, info.text)
    return [
        resolve_requests(
            prompt,
            DiffusionParams(
                negative_prompt=negative,
                height=height,
                width=width,
                num_inference_steps=steps,
                true_cfg_scale=scale,
                seed=100 + i,
            ),
            info,
            RequestLimits(),
            count_tokens,
        )[0]
        for i, (prompt, negative, height, width, steps, scale) in enumerate(ASKED)
    ]


@pytest.fixture(scope="module", params=["small", "odd"])
def model(request, tmp_path_factory):
    return build_qwen_image(tmp_path_factory.mktemp("model") / request.param, size=request.param)


@pytest.fixture(scope="module")
def traces(model, tmp_path_factory):
    """{ranks: [each rank's {script: {seed: latents after each step}}]}"""
    requests = make_requests(model)
    rng = random.Random(5)
    alone = {f"alone-{r.seed}": [(0, r)] for r in requests}
    mixed = {"mixed": [(0, requests[0])] + [(rng.randrange(1, STEPS), r) for r in requests[1:]]}
    return {ranks: run_ranks(model, ranks, alone | mixed, tmp_path_factory.mktemp("traces")) for ranks in (1, 2, 3)}


def one_failure_costs_one_request(model, expected, tmp_path, **options):
    """Of the processes of cfg rank 0, one alone fails, in the midst of a request's steps; the others go on alike."""
    requests = make_requests(model)
    victim = requests[2]  # a long one where the budget is small

    def fault(process, branches):
        if process == 1 and any(branch.request == victim and branch.timestep < 900 for branch in branches):
            raise RuntimeError("out of luck")

    for process in run_ranks(model, 2, {"fault": [(0, request) for request in requests]}, tmp_path, fault, **options):
        others = {seed: trace for seed, trace in process["fault"].items() if seed != victim.seed}
        assert len(others) == len(requests) - 1
        assert all(bitwise_equal(trace, expected[seed]) for seed, trace in others.items())
        assert len(process["fault"].get(victim.seed, [])) < victim.steps


def bitwise_equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_alone_or_among_seven_latents_are_bitwise_equal(traces, ranks):
    by_script = traces[ranks][0]
    for seed, trace in by_script["mixed"].items():
        assert bitwise_equal(trace, by_script[f"alone-{seed}"][seed]), f"request {seed} depends on the batch"


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_bitwise_equal_latents(traces, ranks):
    for script, by_seed in traces[1][0].items():
        for seed, trace in by_seed.items():
            assert bitwise_equal(trace, traces[ranks][0][script][seed]), f"request {seed} depends on the ranks"


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_hold_the_same_latents_after_every_step(traces, ranks):
    first, *others = traces[ranks]
    for other in others:
        for seed, trace in first["mixed"].items():
            assert bitwise_equal(trace, other["mixed"][seed])


def test_every_request_ran_all_its_steps(traces):
    for ranks, by_rank in traces.items():
        for by_script in by_rank:
            steps = {seed: len(trace) for seed, trace in by_script["mixed"].items()}
            assert steps == {100 + i: asked[4] for i, asked in enumerate(ASKED)}, f"on {ranks} ranks"


def test_final_latents_agree_with_diffusers_own_pipeline(traces, model):
    torch.set_num_threads(1)
    reference = QwenImagePipeline.from_pretrained(model)
    reference.set_progress_bar_config(disable=True)
    for i, (prompt, negative, height, width, steps, scale) in enumerate(ASKED):
        expected = reference(
            prompt=prompt,
            negative_prompt=negative,
            true_cfg_scale=scale,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(100 + i),
            output_type="latent",
            max_sequence_length=1024,
        ).images
        difference = (traces[2][0]["mixed"][100 + i][-1] - expected).abs().max().item()
        assert difference <= 1e-4, f"request {i} differs by {difference}"


def test_a_rank_that_fails_alone_costs_one_request(model, traces, tmp_path):
    """A rank that fails alone costs one request and no rank waits."""
    requests = make_requests(model)
    victim = requests[5]

    def fault(rank, branches):
        """Rank 1 alone can't forward the victim's negative branch, from the first step on."""
        if rank == 1 and any(branch.request == victim and branch.branch == 1 for branch in branches):
            raise RuntimeError("out of luck")

    by_rank = run_ranks(model, 2, {"fault": [(0, request) for request in requests]}, tmp_path, fault)
    for by_script in by_rank:
        by_seed = by_script["fault"]
        assert victim.seed not in by_seed, "a failed request is not stepped on any rank"
        assert len(by_seed) == len(requests) - 1
        for seed, trace in by_seed.items():
            assert bitwise_equal(trace, traces[1][0][f"alone-{seed}"][seed])


def test_as_on_gpus_a_rank_that_fails_alone_costs_one_request(model, traces, tmp_path):
    """Over the process group, by NCCL's rules, where ranks learn of a failure a step later."""
    requests = make_requests(model)
    victim = requests[5]

    def fault(rank, branches):
        if rank == 1 and any(branch.request == victim and branch.branch == 1 for branch in branches):
            raise RuntimeError("out of luck")

    script = {"fault": [(0, request) for request in requests]}
    for by_script in run_ranks(model, 2, script, tmp_path, fault, as_on_gpus=True):
        by_seed = by_script["fault"]
        assert len(by_seed.pop(victim.seed, [])) <= 2
        assert len(by_seed) == len(requests) - 1
        for seed, trace in by_seed.items():
            assert bitwise_equal(trace, traces[1][0][f"alone-{seed}"][seed])


@pytest.mark.parametrize("max_tokens", [1_000_000, 40])
def test_text_encoders_on_one_rank_alone_change_no_bit(model, traces, tmp_path, max_tokens):
    """The second rank has none, so it can't but take what it is sent; with 40 tokens some requests are long ones."""
    script = {"one": [(2 * n, request) for n, request in enumerate(make_requests(model))]}
    for by_script in run_ranks(model, 2, script, tmp_path, max_tokens=max_tokens, text_encoder="one"):
        assert len(by_script["one"]) == len(ASKED)
        for seed, trace in by_script["one"].items():
            assert bitwise_equal(trace, traces[1][0][f"alone-{seed}"][seed])


# ---- long requests: those of more than so many tokens on a rank are forwarded beside the steps of the others ----

MAX_TOKENS = 40  # 128x64 and 96x160 px are 32 and 60 tokens, and their texts


def is_long(request):
    return max(map(request.sequence_tokens, range(len(request.prompts)))) > MAX_TOKENS


@pytest.mark.parametrize("ranks", [1, 2])
def test_beside_the_steps_or_in_them_latents_are_equal(model, traces, ranks, tmp_path):
    """Beside the steps or in them the latents are bitwise equal."""
    requests = make_requests(model)
    assert {is_long(request) for request in requests} == {True, False}
    script = {"beside": [(3 * n, request) for n, request in enumerate(requests)]}
    for by_script in run_ranks(model, ranks, script, tmp_path, max_tokens=MAX_TOKENS):
        assert len(by_script["beside"]) == len(requests)
        for seed, trace in by_script["beside"].items():
            assert bitwise_equal(trace, traces[1][0][f"alone-{seed}"][seed])


def test_an_aborted_long_forward_costs_nobody_anything(model, traces, tmp_path):
    """An aborted long forward ends and costs nobody else anything."""
    _, small, victim, other, successor, *_ = make_requests(model)
    assert [is_long(request) for request in (small, victim, other, successor)] == [False, True, False, True]

    def endless(rank, branches):
        """The victim's forwards end only with their cancellation, or with their process."""
        if any(branch.request == victim for branch in branches):
            ends = time.monotonic() + 120
            while time.monotonic() < ends:
                torch.zeros(1)
            os._exit(1)

    # The next long one gets the ranks when the first has left them.
    script = {"abort": [(0, victim), (0, small), (2, other), (12, victim.seed), (13, successor)]}
    for by_script in run_ranks(model, 2, script, tmp_path, endless, max_tokens=MAX_TOKENS):
        assert sorted(by_script["abort"]) == sorted(request.seed for request in (small, other, successor))
        for seed, trace in by_script["abort"].items():
            assert bitwise_equal(trace, traces[1][0][f"alone-{seed}"][seed])
