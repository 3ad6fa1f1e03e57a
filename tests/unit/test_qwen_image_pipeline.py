"""Our Qwen-Image pipeline against diffusers' own, called directly and through the engine's contract."""

import logging

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline as DiffusersQwenImagePipeline

from tests import contract
from tests.contract import generate
from vllm_cfg_plugin.distributed import cfg_parallel
from vllm_cfg_plugin.errors import ConfigurationError, InvalidRequestError
from vllm_cfg_plugin.pipelines.base import generator_of
from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline

CPU = torch.device("cpu")
CASES = [
    {"prompt": "a red apple", "negative_prompt": "", "true_cfg_scale": 4.0, "height": 64, "width": 64},
    {"prompt": "a", "negative_prompt": "ugly, unclear", "true_cfg_scale": 1.5, "height": 32, "width": 96},
    {"prompt": "a lighthouse in the rain, oil painting " * 8, "height": 48, "width": 80},
    {"prompt": ["a cat", "a dog in a hat"], "negative_prompt": ["", "blurry"], "true_cfg_scale": 7.0},
]


@pytest.fixture(scope="module", params=["tiny", "odd"])
def folder(request, qwen_image_folders):
    return str(qwen_image_folders[request.param])


@pytest.fixture(scope="module")
def pipelines(folder):
    """(diffusers' pipeline, ours)"""
    reference = DiffusersQwenImagePipeline.from_pretrained(folder, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return reference, QwenImagePipeline.load(folder, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def tiny_folder(qwen_image_folders):
    return str(qwen_image_folders["tiny"])


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return QwenImagePipeline.load(tiny_folder, dtype=torch.float32, device=CPU)


@pytest.fixture(autouse=True)
def _forget_what_was_logged():
    cfg_parallel.log_once.cache_clear()


def run(pipeline, **kwargs):
    """Images of one short generation with a fixed seed."""
    defaults = {"num_inference_steps": 4, "height": 64, "width": 64, "output_type": "latent"}
    generator = torch.Generator().manual_seed(42)
    return pipeline(**defaults | kwargs, generator=generator, return_dict=False)[0]


def make_request(folder, prompt="a red apple", **params):
    return contract.make_request(
        folder, prompt, **{"height": 64, "width": 48, "num_inference_steps": 4, "seed": 42} | params
    )


@pytest.mark.parametrize("case", CASES)
def test_latents_like_diffusers(pipelines, case):
    reference, ours = pipelines
    expected = run(reference, **case)
    assert expected.std() > 0.5
    torch.testing.assert_close(run(ours, **case), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_bytes_like_diffusers(pipelines, case):
    reference, ours = pipelines
    for expected, image in zip(
        run(reference, **case, output_type="pil"), run(ours, **case, output_type="pil"), strict=True
    ):
        expected, image = np.asarray(expected, np.int16), np.asarray(image, np.int16)
        assert expected.std() > 20
        assert np.abs(expected - image).max() <= 1


@pytest.mark.parametrize("negative_prompt", [None, "", "ugly"])
def test_engine_contract_like_diffusers(pipelines, folder, negative_prompt):
    reference, ours = pipelines
    request = make_request(folder, negative_prompt=negative_prompt, true_cfg_scale=3.0)
    case = {"prompt": "a red apple", "height": 64, "width": 48, "true_cfg_scale": 3.0}
    latents = generate(ours, request)
    expected = run(reference, **case, negative_prompt=negative_prompt)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    assert ours.prediction_shape(request) == tuple(latents.shape[1:])
    pixels = ours.decode(latents, request)
    assert (pixels.dtype, pixels.shape, pixels.device) == (torch.uint8, (1, 64, 48, 3), CPU)
    picture = run(reference, **case, negative_prompt=negative_prompt, output_type="pil")[0]
    assert np.abs(pixels[0].numpy().astype(np.int16) - np.asarray(picture, np.int16)).max() <= 1


def test_engine_and_direct_call_are_bitwise_equal(tiny, tiny_folder):
    request = make_request(tiny_folder, negative_prompt="", true_cfg_scale=3.0)
    case = {"prompt": "a red apple", "negative_prompt": "", "true_cfg_scale": 3.0, "width": 48}
    called = run(tiny, **case)
    assert torch.equal(generate(tiny, request), called)
    assert np.array_equal(tiny.decode(called, request)[0].numpy(), np.asarray(run(tiny, **case, output_type="pil")[0]))


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1, -5])
def test_noise_is_that_of_diffusers_with_a_cpu_generator(tiny, tiny_folder, seed):
    request = make_request(tiny_folder, seed=seed)
    expected = DiffusersQwenImagePipeline.prepare_latents(
        tiny, 1, 4, 64, 48, torch.float32, CPU, torch.Generator().manual_seed(seed)
    )
    assert torch.equal(tiny.draw_noise(request, generator_of(request)), expected)


def test_noise_schedulers_are_independent(tiny, tiny_folder):
    four, two = (make_request(tiny_folder, num_inference_steps=steps) for steps in (4, 2))
    first, second = tiny.make_noise_scheduler(four), tiny.make_noise_scheduler(two)
    assert (len(first.timesteps), len(second.timesteps)) == (4, 2)
    sample = torch.zeros(1, 12, 16)
    first.step(sample, first.timesteps[0], sample)
    assert (first.step_index, second.step_index, second.begin_index) == (1, None, 0)
    assert first is not tiny.scheduler


def test_text_is_encoded_alike_every_time(tiny, tiny_folder):
    texts = ["a red apple", "x", "a lighthouse " * 40]
    requests = [make_request(tiny_folder, text) for text in texts]
    first, second = ([tiny.encode_branch(request, 0).tokens for request in requests] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert [embeds.shape[0] for embeds in first] == [request.text_tokens[0] for request in requests]


class ScaledNoise(QwenImagePipeline):
    def predict_noise(self, current_model=None, **kwargs):
        return 0.5 * (current_model or self.transformer)(**kwargs)[0]


class ClampedNorm(QwenImagePipeline):
    def cfg_normalize_function(self, noise_pred, comb_pred, cfg_renorm_min=0.0):
        scale = (noise_pred.norm(dim=-1, keepdim=True) / (comb_pred.norm(dim=-1, keepdim=True) + 1e-8)).clamp(
            min=cfg_renorm_min, max=1.0
        )
        return comb_pred * scale * 0.9


class PositiveOnly(QwenImagePipeline):
    def combine_cfg_noise(self, noise_pred, neg_noise_pred, true_cfg_scale, cfg_normalize=False):
        return noise_pred


class HalfStep(QwenImagePipeline):
    def scheduler_step(self, noise_pred, t, latents):
        return (latents + super().scheduler_step(noise_pred, t, latents)) / 2

    def step_latents(self, scheduler, noise_pred, timestep, latents, generator=None):
        return (latents + super().step_latents(scheduler, noise_pred, timestep, latents, generator)) / 2


@pytest.mark.parametrize("override", [ScaledNoise, ClampedNorm, PositiveOnly, HalfStep])
def test_an_override_acts_in_the_direct_call_and_in_the_engine(tiny, tiny_folder, override):
    pipeline = override(**tiny.components)
    case = {"prompt": "a red apple", "negative_prompt": "", "true_cfg_scale": 3.0, "width": 48}
    called = run(pipeline, **case)
    assert (called - run(tiny, **case)).abs().max() > 1e-2
    request = make_request(tiny_folder, negative_prompt="", true_cfg_scale=3.0)
    assert torch.equal(generate(pipeline, request), called)


def test_output_slice_keeps_the_first_tokens(tiny):
    class Predicts(cfg_parallel.CFGParallelMixin):
        def predict_noise(self, value):
            return torch.full((1, 6, 2), value) * torch.arange(6.0)[:, None]

    noise = Predicts().predict_noise_maybe_with_cfg(True, 2.0, {"value": 3.0}, {"value": 1.0}, False, output_slice=4)
    assert noise[0, :, 0].tolist() == [0, 5, 10, 15]
    unguided = Predicts().predict_noise_maybe_with_cfg(False, 2.0, {"value": 3.0}, None, output_slice=4)
    assert unguided[0, :, 0].tolist() == [0, 3, 6, 9]


def test_a_guided_step_needs_the_negative_branch(tiny):
    with pytest.raises(ValueError, match="negative_kwargs=None"):
        tiny.predict_noise_maybe_with_cfg(True, 4.0, {}, None)


def test_scale_names_and_default(tiny):
    guided = {"prompt": "a cat", "negative_prompt": ""}
    assert torch.equal(run(tiny, **guided), run(tiny, **guided, true_cfg_scale=4.0))
    assert torch.equal(run(tiny, **guided, guidance_scale=2.0), run(tiny, **guided, true_cfg_scale=2.0))
    both = run(tiny, **guided, guidance_scale=9.0, true_cfg_scale=2.0)
    assert torch.equal(both, run(tiny, **guided, true_cfg_scale=2.0))
    explicit_zero = run(tiny, **guided, true_cfg_scale=0.0)
    assert torch.equal(explicit_zero, run(tiny, prompt="a cat"))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"negative_prompt": "", "true_cfg_scale": 1.0}, "the guidance scale 1 is not above 1"),
        ({"guidance_scale": 3.5}, "the scale is 3.5, but there is no negative prompt"),
    ],
)
def test_guidance_that_is_off_is_explained_once(tiny, caplog, case, reason):
    with caplog.at_level(logging.WARNING, logger="vllm_cfg_plugin"):
        run(tiny, prompt="a cat", **case)
        run(tiny, prompt="a dog", **case)
    assert [record.message for record in caplog.records if "guidance is off" in record.message] == [
        record.message for record in caplog.records if reason in record.message
    ]
    assert sum(reason in record.message for record in caplog.records) == 1


def test_nothing_is_said_where_guidance_was_not_asked_for(tiny, caplog):
    run(tiny, prompt="a cat")
    assert not [record for record in caplog.records if record.name.startswith("vllm_cfg_plugin")]


def test_one_step_is_refused_where_it_would_divide_by_zero(tiny):
    """One step is refused where the schedule would divide by zero."""
    with pytest.raises(InvalidRequestError, match="num_inference_steps=1"):
        run(tiny, prompt="a cat", num_inference_steps=1)


def test_the_loop_of_the_mixin_gives_the_latents_of_a_call(tiny):
    """`diffuse` is for pipelines of one's own; on the same inputs it does what the pipeline does itself."""
    case = {"prompt": ["a cat", "a dog"], "negative_prompt": "ugly", "true_cfg_scale": 3.0}
    expected = run(tiny, **case)
    scheduler = tiny.scheduler
    tiny.scheduler = type(scheduler).from_config(scheduler.config)
    try:
        with torch.no_grad():
            (embeds, mask), (negative, negative_mask) = (
                tiny.encode_prompt(text) for text in (case["prompt"], ["ugly", "ugly"])
            )
            generator = torch.Generator().manual_seed(42)
            latents = tiny.prepare_latents(2, 4, 64, 64, torch.float32, CPU, generator)
            tiny.set_timesteps(tiny.scheduler, 4, latents.shape[1], CPU)
            latents = tiny.diffuse(
                embeds,
                mask,
                negative,
                negative_mask,
                latents,
                img_shapes=[[(1, 4, 4)]] * 2,
                txt_seq_lens=None,
                negative_txt_seq_lens=None,
                timesteps=tiny.scheduler.timesteps,
                do_true_cfg=True,
                guidance=None,
                true_cfg_scale=3.0,
            )
    finally:
        tiny.scheduler = scheduler
    # Texts that are encoded together are padded to one length, which is in their last bits.
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("argument", [{"sigmas": [1.0, 0.5]}, {"callback_on_step_end": print}])
def test_what_only_diffusers_loop_takes_is_refused(tiny, argument):
    with pytest.raises(InvalidRequestError, match=f"{next(iter(argument))}=.*left out"):
        run(tiny, prompt="a cat", **argument)


def test_a_call_without_a_prompt_is_refused(tiny):
    with pytest.raises(InvalidRequestError, match="prompt=null is not valid: it must be a text"):
        run(tiny)


def test_several_images_per_prompt(tiny):
    images = run(tiny, prompt="a cat", negative_prompt="", num_images_per_prompt=3, output_type="pil")
    assert [image.size for image in images] == [(64, 64)] * 3


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="can't be loaded"):
        QwenImagePipeline.load(str(tmp_path), dtype=torch.float32, device=CPU)


@torch.inference_mode()
def test_changed_weights_act_once_derived_is_forgotten(qwen_image_folders):
    """Changed weights act once what was computed from them is forgotten."""
    pipeline = QwenImagePipeline.load(str(qwen_image_folders["tiny"]), dtype=torch.float32, device=torch.device("cpu"))
    transformer = pipeline.transformer
    ahead = torch.tensor([0.5, 0.25])

    def modulation():
        return transformer.modulations.get(transformer, [0.75], ahead, torch.float32)[0].scale.clone()

    before = modulation()
    transformer.norm_out.linear.weight.mul_(2)
    assert torch.equal(modulation(), before), "remembered: this is what has to be forgotten"
    pipeline.forget_derived()
    assert not torch.equal(modulation(), before)
