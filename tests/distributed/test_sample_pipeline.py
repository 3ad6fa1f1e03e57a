"""The documentation's sample pipeline shows all that the served families show, and what it says of itself."""

import pytest
import torch

from tests import contract
from tests.distributed.ranks import run_ranks as run_direct
from tests.distributed.test_families import (  # noqa: F401
    _call_directly,
    folder,
    test_final_latents_are_those_of_diffusers,
    test_latents_are_equal_alone_among_others_on_two_ranks,
    traces,
)
from tests.families import SEED, STEPS, Case, Family, call, load
from tests.model_builders.aura_flow import build_aura_flow
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.pipelines import registry
from vllm_cfg_plugin.worker import calibration, stopwatch

pytestmark = pytest.mark.distributed

CLASS_NAME, IMPLEMENTATION = "AuraFlowPipeline", "examples.custom_pipeline.aura_flow:AuraFlowPipeline"


def sized(height, width, **params):
    return {"height": height, "width": width, "num_inference_steps": STEPS, **params}


SAMPLE = Family(
    CLASS_NAME,
    build_aura_flow,
    (
        Case("guided", "a Red apple", sized(32, 48, guidance_scale=4.0, negative_prompt="ugly")),
        Case("unguided", "a rocket", sized(16, 32, guidance_scale=1.0)),
        Case("guided by nothing, long text", "cat " * 40, sized(32, 32, guidance_scale=2.5)),
    ),
)


@pytest.fixture(scope="module")
def family():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FAMILIES, CLASS_NAME, IMPLEMENTATION)
        yield SAMPLE


def call_sample_directly(model, cases):
    """On a rank, which has a registry of its own."""
    registry.FAMILIES[CLASS_NAME] = IMPLEMENTATION
    return _call_directly(model, cases)


def test_a_direct_call_gives_the_engines_latents(family, folder, traces):  # noqa: F811
    """A direct call on two ranks or one gives the engine's latents."""
    pipeline = load(folder)
    alone = [call(pipeline, case, SEED + i) for i, case in enumerate(family.cases)]
    for by_case in run_direct(call_sample_directly, 2, folder, family.cases):
        for i, latents in enumerate(by_case):
            assert torch.equal(torch.from_numpy(latents), alone[i])
            assert torch.equal(alone[i], traces[1][f"alone-{SEED + i}"][SEED + i][-1])


def test_decoded_images_are_those_of_diffusers(family, folder):  # noqa: F811
    case, request = family.cases[0], family.requests(folder)[0]
    (expected,) = call(family.reference(folder), case, SEED, output_type="pil")
    pipeline = load(folder)
    (image,) = pipeline.decode(contract.generate(pipeline, request), request)
    contract.assert_same_pixels(image, expected)
    contract.assert_same_pixels(call(pipeline, case, SEED, output_type="pil")[0], expected)


def test_tokens_are_counted(family, folder):  # noqa: F811
    pipeline = load(folder)
    for request in family.requests(folder):
        contract.assert_tokens_are_counted(pipeline, request)
    with pytest.raises(ValueError, match="at most 64 for this model"):
        contract.make_request(folder, "a cat", height=68)
    too_long = "cat " * 300
    with pytest.raises(ValueError, match="at most 256 tokens"):
        contract.make_request(folder, too_long)


def test_start_up_can_time_it(family, folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(stopwatch, "ALL_RUNS_SECONDS", 0.2)
    measured = calibration.calibrate(load(folder), registry.describe(Checkpoint(str(folder))))
    assert measured.token_budget > 0
