"""The end of a step for many requests at once: bit by bit what each gets by its hooks, and hooks where they must be."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tests.toy_pipeline import ToyPipeline, toy_request
from tests.unit.fake_cuda import fake_cuda, to_fake
from vllm_cfg_plugin.worker.advance import Move, combine_all, step_all
from vllm_cfg_plugin.worker.state import RequestState

STEPS = 4
GUIDANCE = [{}, {"scale": 2.5}, {"scale": 7.0}, {"normalize": True}, {"rescale": 0.5}, {"rule": "apg"}, {"scale": 1.1}]


def euler(**config):
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(STEPS, device="cpu")
    scheduler.set_begin_index(0)
    return scheduler


def unipc():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(0)
    return scheduler


def make_states(make_scheduler=euler, dtype=torch.float32):
    """Requests of unlike sizes and guidance, one of them unguided."""
    states = []
    for id, guidance in enumerate([*GUIDANCE, None]):
        request = toy_request(steps=STEPS, negative="" if guidance is not None else None, **(guidance or {}))
        latents = torch.randn(1, 5 + 11 * id, 4, generator=torch.Generator().manual_seed(id)).to(dtype)
        states.append(RequestState(id, request, latents, make_scheduler()))
    return states


def predictions_of(state):
    generator = torch.Generator().manual_seed(100 * state.id + state.index)
    return [
        torch.randn(state.latents.shape, generator=generator).to(state.latents.dtype) for _ in state.request.prompts
    ]


def advance(pipeline, states):
    moves = [Move(state, predictions_of(state)) for state in states]
    combine_all(pipeline, moves)
    step_all(pipeline, moves)
    for state in states:
        state.index += 1
    return moves


@pytest.fixture
def foreach_calls(monkeypatch):
    """How many tensors each `_foreach_add_` was given: twice a step, for guidance and for Euler's step."""
    calls, original = [], torch._foreach_add_
    monkeypatch.setattr(
        torch, "_foreach_add_", lambda tensors, *args: calls.append(len(tensors)) or original(tensors, *args)
    )
    return calls


def test_all_at_once_the_bits_are_those_of_one_by_one(foreach_calls):
    pipeline, together, alone = ToyPipeline(), make_states(), make_states()
    for _ in range(STEPS):
        assert not any(move.error for move in advance(pipeline, together))
        for state in alone:
            advance(pipeline, [state])
    for state, other in zip(together, alone, strict=True):
        assert torch.equal(state.latents, other.latents)
        assert state.noise_scheduler.step_index == other.noise_scheduler.step_index == STEPS
    plain = [guidance for guidance in GUIDANCE if guidance.keys() <= {"scale"}]
    assert foreach_calls == [len(plain), len(GUIDANCE) + 1] * STEPS


@pytest.mark.parametrize(
    ("make_scheduler", "dtype"),
    [(unipc, torch.float32), (lambda: euler(stochastic_sampling=True), torch.float32), (euler, torch.bfloat16)],
    ids=["another noise scheduler", "one that draws noise", "fewer bits on a CPU"],
)
def test_other_steps_are_taken_by_the_hook(foreach_calls, make_scheduler, dtype):
    torch.manual_seed(0)
    pipeline, together = ToyPipeline(), make_states(make_scheduler, dtype)
    assert not any(move.error for move in advance(pipeline, together))
    assert len(foreach_calls) == 1, "guidance"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_launches_as_many_kernels_for_many_requests(dtype):
    launches = {}
    for requests in (2, 8):
        with fake_cuda() as gpu:
            states = [
                RequestState(id, toy_request(), torch.empty(1, 3 + id, 4, dtype=dtype), euler())
                for id in range(requests)
            ]
            for state in states:
                state.latents = to_fake(state.latents)
            moves = [Move(state, [to_fake(state.latents)] * 2) for state in states]
            counts = gpu.start_counting()
            combine_all(ToyPipeline(), moves)
            step_all(ToyPipeline(), moves)
            assert not any(move.error for move in moves)
        assert {state.latents.dtype for state in states} == {dtype}
        assert counts.syncs == {}
        launches[requests] = counts.launches.total()
    assert launches[2] == launches[8] == (5 if dtype == torch.float32 else 8)


@pytest.mark.parametrize("name", ["combine_branches", "combine_cfg_noise", "step_latents"])
@pytest.mark.parametrize("of_class", [True, False])
def test_a_hook_that_is_overridden_is_called_for_every_request(name, of_class):
    called = []

    def record(self, *args):
        called.append(name)
        return getattr(ToyPipeline, name)(self, *args)

    fields = {name: record, "guidance_fields": ToyPipeline.guidance_fields}
    pipeline = type("Overridden", (ToyPipeline,), fields)() if of_class else ToyPipeline()
    if not of_class:
        setattr(pipeline, name, lambda *args: record(pipeline, *args))
    states = make_states()
    advance(pipeline, states)
    asked = [state for state in states if name != "combine_cfg_noise" or state.request.guidance.rule == "cfg"]
    assert len(called) == len(asked) - (name == "combine_cfg_noise"), "the last one has one branch"


def test_one_request_that_cannot_step_costs_nobody_else_anything():
    pipeline, states, lucky = ToyPipeline(), make_states(), make_states()
    states[1].noise_scheduler.sigmas = states[1].noise_scheduler.sigmas[:1]
    before = copy.deepcopy(states[1].latents)
    moves = advance(pipeline, states)
    advance(pipeline, lucky)
    assert [move.state.id for move in moves if move.error] == [1]
    assert torch.equal(states[1].latents, before)
    for state, other in zip(states, lucky, strict=True):
        assert state.id == 1 or torch.equal(state.latents, other.latents)
