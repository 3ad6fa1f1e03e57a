"""Every noise scheduler of diffusers with every family: the family's own pipeline of diffusers says what is right.

What diffusers' pipeline runs, ours runs to the same latents or refuses at start. The noise of steps is drawn there from
torch's global generator and here from the request's, so there the request's is passed on.
"""

import inspect
import json
from copy import deepcopy
from dataclasses import replace
from functools import partial

import diffusers
import msgspec
import pytest
import torch

from tests.contract import generate, make_request
from tests.families import FAMILIES, arguments, call, load
from tests.unit.fakes import VIDEO_INFO
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.errors import ConfigurationError, InvalidRequestError
from vllm_cfg_plugin.pipelines.registry import check_servable, describe
from vllm_cfg_plugin.pipelines.sample_request import sample_request
from vllm_cfg_plugin.worker.noise_scheduler_check import check_noise_scheduler

STEPS, SEED = 3, 5

# Options beside the defaults of every class, which are tried too.
OPTIONS = {
    "FlowMatchEulerDiscreteScheduler": [
        {"stochastic_sampling": True},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "shift": 3.0},
        {"invert_sigmas": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "shift_terminal": 0.1},
    ],
    "FlowMatchLCMScheduler": [{"scale_factors": [0.5, 1.0]}, {"use_dynamic_shifting": True}],
    "FlowMatchHeunDiscreteScheduler": [{"shift": 3.0}],
    "UniPCMultistepScheduler": [
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True},
        {"use_karras_sigmas": True},
    ],
    "DPMSolverMultistepScheduler": [
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        {"solver_order": 3, "prediction_type": "v_prediction", "final_sigmas_type": "sigma_min"},
    ],
    "DPMSolverSinglestepScheduler": [
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "algorithm_type": "sde-dpmsolver++"}
    ],
    "DEISMultistepScheduler": [{"use_flow_sigmas": True, "prediction_type": "flow_prediction"}],
    "SASolverScheduler": [{"use_flow_sigmas": True, "prediction_type": "flow_prediction"}],
    "PNDMScheduler": [{"skip_prk_steps": True}],
    "DDIMScheduler": [{"timestep_spacing": "trailing", "prediction_type": "v_prediction"}],
    "EulerDiscreteScheduler": [{"use_karras_sigmas": True, "prediction_type": "v_prediction"}],
}
NOT_STEPPED = ("ScoreSdeVeScheduler", "ScoreSdeVpScheduler")  # these have other methods than `step`
CLASSES = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and name not in NOT_STEPPED)
TABLE = [(name, options) for name in CLASSES for options in ({}, *OPTIONS.get(name, []))]
BY_LABEL = {family.label: family for family in FAMILIES}
KINDS = (
    "QwenImagePipeline",
    "LongCatImagePipeline",
    "FluxPipeline",
    "StableDiffusion3Pipeline",
    "ZImagePipeline",
    "WanPipeline (2.1)",
)
# Of one kind each, with guidance and with images: step by step in one order, by two orders, by steps that draw noise.
FEW = [
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("UniPCMultistepScheduler", OPTIONS["UniPCMultistepScheduler"][0]),
    ("DPMSolverMultistepScheduler", OPTIONS["DPMSolverMultistepScheduler"][1]),
]
GUIDED = ("QwenImagePipeline", "ZImagePipeline", "QwenImageEditPipeline", "LongCatImageEditPipeline")


class Model:
    """A family's tiny checkpoint, in diffusers' pipeline and in ours, of which the noise scheduler is exchanged."""

    def __init__(self, family, folder, mode="unguided"):
        self.folder = family.build(folder / "model")
        self.reference, self.ours = family.reference(self.folder), load(self.folder)
        self.family = family
        case = next(case for case in family.cases if case.mode.startswith(mode))
        sides = {} if case.images else {"height": 32, "width": 32}
        self.case = replace(case, params={**case.params, **sides, "num_inference_steps": STEPS})
        info = describe(Checkpoint(str(self.folder)))
        few = msgspec.structs.replace(info.default_params, num_inference_steps=STEPS)
        self.info = replace(info, default_params=few)
        self.request = make_request(self.folder, case.prompt, case.images, seed=SEED, **self.case.params)

    def expected(self, scheduler):
        """Latents of diffusers' pipeline; None where it does not run."""
        generator = torch.Generator().manual_seed(SEED)
        if "generator" in inspect.signature(scheduler.step).parameters:
            scheduler.step = partial(scheduler.step, generator=generator)
        self.reference.scheduler = scheduler
        try:
            return self.reference(**arguments(self.case), generator=generator, output_type="latent", return_dict=False)[
                0
            ]
        except Exception:
            return None

    def checkpoint(self, folder, scheduler):
        """The checkpoint with another noise scheduler."""
        for part in self.folder.iterdir():
            if part.name not in ("scheduler", "model_index.json"):
                (folder / part.name).symlink_to(part)
        scheduler.save_pretrained(folder / "scheduler")
        index = json.loads((self.folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (folder / "model_index.json").write_text(json.dumps(index))
        (folder / "generation_config.json").write_text(
            json.dumps({"num_inference_steps": STEPS, "height": 128, "width": 192})
        )
        return Checkpoint(str(folder))

    def served(self, checkpoint, scheduler):
        """(why it is refused at start, or '', latents)"""
        try:
            check_servable(checkpoint)
            info = describe(checkpoint)
            self.ours.scheduler = scheduler
            check_noise_scheduler(self.ours, info)
        except ConfigurationError as error:
            return str(error), None
        request = msgspec.structs.replace(self.request, num_timesteps=info.num_timesteps(STEPS))
        latents, again = (generate(self.ours, request) for _ in range(2))
        assert torch.equal(latents, again)
        return "", self.family.to_reference(self.ours, latents, request)


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    return Model(BY_LABEL[request.param], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=GUIDED)
def guided_model(request, tmp_path_factory):
    return Model(BY_LABEL[request.param], tmp_path_factory.mktemp("model"), "guided")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), TABLE, ids=str)
def test_as_diffusers_or_refused(model, name, options, tmp_path):
    check_as_diffusers_or_refused(model, name, options, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), FEW, ids=str)
def test_with_guidance_and_images_as_diffusers_or_refused(guided_model, name, options, tmp_path):
    check_as_diffusers_or_refused(guided_model, name, options, tmp_path)


def check_as_diffusers_or_refused(model, name, options, tmp_path):
    try:
        scheduler = getattr(diffusers, name)(**options)
        checkpoint = model.checkpoint(tmp_path, scheduler)
    except (ImportError, TypeError, ValueError) as error:
        pytest.skip(f"it can't be made here: {error}")
    expected = model.expected(deepcopy(scheduler))
    reason, latents = model.served(checkpoint, scheduler)
    if reason:
        assert expected is None or "scale_factors" in options, f"diffusers runs it: {reason}"
        assert "\n" not in reason
    elif expected is not None:
        assert (latents - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max())


def test_a_step_may_be_two_timesteps(model, tmp_path):
    if model.family.class_name != "WanPipeline":
        pytest.skip("one family is enough")
    heun = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    checkpoint = model.checkpoint(tmp_path, heun)
    case = replace(model.case, params={**model.case.params, "guidance_scale": 4.0})
    request = make_request(checkpoint.model, case.prompt, seed=SEED, **case.params, guidance_interval=(0.0, 1.0))
    assert (request.num_inference_steps, request.steps) == (STEPS, 2 * STEPS - 1)
    assert [request.branches_at(step) for step in range(request.steps)] == [2] * request.steps
    model.ours.scheduler = heun
    assert torch.equal(generate(model.ours, request), call(model.ours, case, SEED))


def test_noise_that_no_seed_decides_is_refused(model):
    class Unseeded(diffusers.FlowMatchEulerDiscreteScheduler):
        def step(self, *args, return_dict=False):
            (stepped,) = super().step(*args, return_dict=return_dict)
            return (stepped + torch.randn(stepped.shape),)

    before = torch.get_rng_state()
    model.ours.scheduler = Unseeded()
    with pytest.raises(ConfigurationError, match="does not follow from a request's seed"):
        check_noise_scheduler(model.ours, model.info)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_timesteps_than_described_are_refused(model):
    if model.family.class_name != "WanPipeline":
        pytest.skip("one family is enough")
    model.ours.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ConfigurationError, match="it takes 5 timesteps where `describe` says 3"):
        check_noise_scheduler(model.ours, model.info)


def test_an_error_without_text_is_named(model, tmp_path):
    if model.family.class_name != "FluxPipeline":
        pytest.skip("one family is enough")
    asserts = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ConfigurationError, match="can't be set to 3 steps: AssertionError"):
        check_servable(model.checkpoint(tmp_path, asserts))


def test_steps_that_a_schedule_has_not_are_refused_by_name(model, tmp_path):
    stretched = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    if model.family.class_name != "ZImagePipeline":
        pytest.skip("one family is enough")
    folder = model.checkpoint(tmp_path, stretched).model
    assert make_request(folder, "a cat", num_inference_steps=2).steps == 2
    with pytest.raises(InvalidRequestError, match="num_inference_steps=1 is not valid"):
        make_request(folder, "a cat", num_inference_steps=1)


def test_the_start_asks_for_a_video_of_two_images():
    """The start asks for a video with a first and a last frame."""
    info = replace(VIDEO_INFO, min_images=2, max_images=2)  # nine frames by default
    assert [sample_request(info, scale).num_frames for scale in (0.25, 0.5, 1, 4)] == [5, 5, 9, 9]
