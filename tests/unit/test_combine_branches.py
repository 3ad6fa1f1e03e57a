"""How the engine combines a request's branches: each field that a user may set acts, or is refused by name."""

import dataclasses

import pytest
import torch

from tests.toy_pipeline import ToyPipeline
from tests.unit.test_params import INFO, LIMITS
from vllm_cfg_plugin import guidance
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, Guidance
from vllm_cfg_plugin.resolve import resolve_requests

SCALE = 4.0
# Far apart, for APG to cut their difference.
POSITIVE, NEGATIVE = (5 * torch.randn(2, 1, 9, 4, generator=torch.Generator().manual_seed(0))).unbind()


def combine(step=1, **asked):
    request = DiffusionRequest(
        prompts=["a", "b"],
        text_tokens=[1, 1],
        image_tokens=9,
        height=8,
        width=8,
        num_inference_steps=4,
        seed=0,
        guidance=Guidance(scale=SCALE, **asked),
    )
    return ToyPipeline().combine_branches([POSITIVE, NEGATIVE], request, torch.tensor(1.0), step)


RULES = {
    "cfg": guidance.classifier_free_guidance,
    "cfg_zero_star": guidance.zero_star_guidance,
    "apg": guidance.adaptive_projected_guidance,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_rule_normalization_and_rescale_all_act(rule, normalize, rescale):
    expected = RULES[rule](POSITIVE, NEGATIVE, SCALE)
    if normalize:
        expected = guidance.rescale_to_norm(POSITIVE, expected)
    if rescale:
        expected = guidance.rescale_to_deviation(POSITIVE, expected, rescale)
    assert torch.equal(combine(rule=rule, normalize=normalize, rescale=rescale), expected)


def test_the_cases_differ():
    cases = [combine(rule=rule, rescale=rescale) for rule in RULES for rescale in (0.0, 0.7)]
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(cases) for other in cases[:i])


def test_zero_star_predicts_zeros_first():
    assert not combine(step=0, rule="cfg_zero_star").any()
    assert combine(step=0, rule="apg").any()


def test_a_formula_of_a_familys_own_must_say_what_it_reads():
    with pytest.raises(TypeError, match="guidance_fields to those of cfg_normalize, combine_rule, guidance_rescale"):

        class Silent(ToyPipeline):
            def combine_branches(self, predictions, request, timestep, step):
                return predictions[0]

    class Honest(ToyPipeline):
        guidance_fields = frozenset()

        def combine_branches(self, predictions, request, timestep, step):
            return predictions[0]

    class Heir(Honest):
        pass

    assert Heir.guidance_fields == frozenset()


@pytest.mark.parametrize("field", [{"cfg_normalize": True}, {"guidance_rescale": 0.5}, {"combine_rule": "apg"}])
def test_what_a_formula_does_not_read_is_refused(field):
    info = dataclasses.replace(INFO, guidance_fields=frozenset())
    asked = DiffusionParams(negative_prompt="", true_cfg_scale=3.0, **field)
    with pytest.raises(InvalidRequestError, match="this model's guidance does not read it") as refused:
        resolve_requests("a cat", asked, info, LIMITS, len)
    assert refused.value.param == next(iter(field))


@pytest.mark.parametrize(
    "field",
    [
        {"guidance_scale_2": 4.0},
        {"guidance_rescale": 0.5},
        {"combine_rule": "apg"},
        {"cfg_normalize": True},
        {"guidance_interval": (0.2, 0.8)},
    ],
)
def test_guidance_that_is_off_says_why(field):
    """As diffusers' Wan: `guidance_scale` alone decides whether there is guidance."""
    info = dataclasses.replace(INFO, needs_negative_prompt=False, options=frozenset({"guidance_scale_2"}))
    asked = DiffusionParams(true_cfg_scale=1.0, **field)
    (request,) = resolve_requests("a cat", asked, info, LIMITS, len)
    assert not request.guided
    assert request.guidance_off == f"{next(iter(field))} was given, but true_cfg_scale is 1, not above 1"
