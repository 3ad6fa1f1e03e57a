"""Our Z-Image pipeline against diffusers' own, called directly and through the engine's contract."""

import copy

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline as DiffusersZImagePipeline

from tests import contract
from tests.contract import assert_packed_is_alone, assert_same_pixels, assert_tokens_are_counted, generate
from tests.model_builders.z_image import build_z_image
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.distributed import cfg_parallel
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.pipelines.base import generator_of
from vllm_cfg_plugin.pipelines.registry import describe
from vllm_cfg_plugin.pipelines.z_image import ZImagePipeline

CPU = torch.device("cpu")
CASES = [
    {"prompt": "a red apple", "guidance_scale": 4.0},
    {"prompt": "a", "negative_prompt": "ugly, unclear", "guidance_scale": 0.5, "height": 32, "width": 96},
    {"prompt": "a lighthouse in the rain, oil painting " * 8, "guidance_scale": 0.0, "height": 48, "width": 80},
    {"prompt": ["a cat", "a dog in a hat"], "negative_prompt": ["", "blurry"], "guidance_scale": 7.0},
    {"prompt": "a cat", "guidance_scale": 7.0, "cfg_normalization": True},
    {"prompt": ["a cat", "a dog"], "guidance_scale": 7.0, "cfg_normalization": 1.2},
    {"prompt": "a cat", "guidance_scale": 7.0, "cfg_truncation": 0.4},
    {"prompt": "a cat", "guidance_scale": 7.0, "cfg_truncation": None, "num_images_per_prompt": 2},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("z_image")
    return {
        "tiny": str(build_z_image(root / "tiny")),
        "odd": str(build_z_image(root / "odd", size="odd", dynamic_shifting=True)),
    }


@pytest.fixture(scope="module", params=["tiny", "odd"])
def folder(request, folders):
    return folders[request.param]


@pytest.fixture(scope="module")
def pipelines(folder):
    """(diffusers' pipeline, ours)"""
    reference = DiffusersZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return reference, ZImagePipeline.load(folder, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def tiny(folders):
    return ZImagePipeline.load(folders["tiny"], dtype=torch.float32, device=CPU)


def run(pipeline, **kwargs):
    """Images of one short generation with a fixed seed."""
    defaults = {"num_inference_steps": 6, "height": 64, "width": 64, "output_type": "latent"}
    generator = torch.Generator().manual_seed(42)
    kwargs = copy.deepcopy(kwargs)  # diffusers writes its chat template into the caller's list of prompts
    return pipeline(**defaults | kwargs, generator=generator, return_dict=False)[0]


def make_request(folder, prompt="a red apple", **params):
    return contract.make_request(
        folder, prompt, **{"height": 64, "width": 48, "num_inference_steps": 6, "seed": 42} | params
    )


@pytest.mark.parametrize("case", CASES)
def test_latents_like_diffusers(pipelines, case):
    reference, ours = pipelines
    expected = run(reference, **case)
    assert expected.std() > 0.5
    torch.testing.assert_close(run(ours, **case), expected, rtol=0, atol=1e-4)


def test_the_cases_differ(pipelines):
    """Otherwise an option that does nothing would pass."""
    _, ours = pipelines
    plain = run(ours, prompt="a cat", guidance_scale=7.0)
    for options in ({"cfg_normalization": True}, {"cfg_truncation": 0.4}, {"negative_prompt": "ugly"}):
        assert (run(ours, prompt="a cat", guidance_scale=7.0, **options) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES[:4])
def test_bytes_like_diffusers(pipelines, case):
    reference, ours = pipelines
    pictures = run(reference, **case, output_type="pil"), run(ours, **case, output_type="pil")
    for expected, image in zip(*pictures, strict=True):
        assert_same_pixels(image, expected)


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("negative_prompt", [None, "ugly"])
def test_engine_contract_like_diffusers(pipelines, folder, negative_prompt, guidance_scale):
    reference, ours = pipelines
    options = {"negative_prompt": negative_prompt, "guidance_scale": guidance_scale}
    request = make_request(folder, **options)
    assert request.guided == (guidance_scale > 0)
    case = {"prompt": "a red apple", "height": 64, "width": 48, **options}
    latents = generate(ours, request)
    torch.testing.assert_close(latents, run(reference, **case), rtol=0, atol=1e-4)
    pixels = ours.decode(latents, request)
    assert (pixels.dtype, pixels.shape, pixels.device) == (torch.uint8, (1, 64, 48, 3), CPU)
    assert_same_pixels(pixels[0], run(reference, **case, output_type="pil")[0])


@pytest.mark.parametrize("normalize", [False, True])
def test_engine_and_direct_call_are_bitwise_equal(tiny, folders, normalize):
    request = make_request(folders["tiny"], guidance_scale=3.0, cfg_normalize=normalize)
    case = {"prompt": "a red apple", "guidance_scale": 3.0, "cfg_normalization": normalize, "width": 48}
    called, generated = run(tiny, **case), generate(tiny, request)
    assert torch.equal(generated, called)
    picture = np.asarray(run(tiny, **case, output_type="pil")[0])
    assert np.array_equal(tiny.decode(generated, request)[0].numpy(), picture)


def test_packed_branches_are_bitwise_those_alone(tiny, folders):
    """Requests of other sizes, texts and steps in one forward, both branches of each."""
    sizes = [(64, 48), (16, 16), (128, 96), (256, 288)]
    requests = [
        make_request(folders["tiny"], "a cat " * (1 + 9 * i), height=height, width=width, seed=i)
        for i, (height, width) in enumerate(sizes)
    ]
    assert_packed_is_alone(tiny, requests)


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1, -5])
def test_noise_is_that_of_diffusers_with_a_cpu_generator(tiny, folders, seed):
    request = make_request(folders["tiny"], seed=seed)
    expected = DiffusersZImagePipeline.prepare_latents(
        tiny, 1, 4, 64, 48, torch.float32, CPU, torch.Generator().manual_seed(seed)
    )
    assert torch.equal(tiny.draw_noise(request, generator_of(request)), expected)


def test_given_latents_are_those_that_are_denoised(pipelines):
    reference, ours = pipelines
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = run(reference, prompt="a cat", latents=latents)
    torch.testing.assert_close(run(ours, prompt="a cat", latents=latents), expected, rtol=0, atol=1e-4)


def test_texts_are_those_of_diffusers_and_as_long_as_foretold(pipelines, folder):
    reference, ours = pipelines
    for text in ("a red apple", "x", "", "a {lighthouse} " * 40, "word " * 600):
        expected = reference.encode_prompt([text], CPU, do_classifier_free_guidance=False)[0][0]
        first, second = (ours._encode_text(text, CPU, 512) for _ in range(2))
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)
    for text in ("a red apple", "x", "a {lighthouse} " * 40):
        request = make_request(folder, text)
        assert_tokens_are_counted(ours, request)
        assert ours.draw_noise(request, generator_of(request)).shape == (1, 4, 8, 6)


def test_an_override_acts_in_the_direct_call_and_in_the_engine(tiny, folders):
    class ScaledNoise(ZImagePipeline):
        def predict_noise(self, **kwargs):
            return 0.5 * super().predict_noise(**kwargs)

    class HalfCut(ZImagePipeline):
        def cfg_normalize_function(self, noise_pred, comb_pred, most=1.0):
            return super().cfg_normalize_function(noise_pred, comb_pred, 0.5 * most)

    class PositiveOnly(ZImagePipeline):
        def combine_cfg_noise(self, noise_pred, neg_noise_pred, true_cfg_scale, cfg_normalize=False):
            return noise_pred

    case = {"prompt": "a red apple", "guidance_scale": 3.0, "width": 48, "cfg_normalization": True}
    request = make_request(folders["tiny"], guidance_scale=3.0, cfg_normalize=True)
    for override in (ScaledNoise, HalfCut, PositiveOnly):
        pipeline = override(**tiny.components)
        called = run(pipeline, **case)
        assert (called - run(tiny, **case)).abs().max() > 1e-2
        assert torch.equal(generate(pipeline, request), called)


def test_guidance_that_is_off_is_explained_once(tiny, caplog):
    cfg_parallel.log_once.cache_clear()
    for _ in range(2):
        run(tiny, prompt="a cat", negative_prompt="ugly", guidance_scale=0.0, num_inference_steps=1)
    assert [record.message for record in caplog.records if "guidance is off" in record.message] == [
        "guidance is off: a negative prompt was given, but guidance_scale=0 is not > 0"
    ]


def test_a_size_that_is_not_one_of_whole_tokens_is_refused(tiny):
    with pytest.raises(InvalidRequestError, match=r"height=40.*multiple of 16"):
        run(tiny, prompt="a cat", height=40)


def test_what_the_front_end_is_told(folders):
    info = describe(Checkpoint(folders["tiny"]))
    assert (info.size_multiple, info.pixels_per_token, info.task) == (16, 16, "text-to-image")
    assert info.default_params.guidance_scale == 5.0


@torch.inference_mode()
def test_changed_weights_act_once_derived_is_forgotten(folders):
    """Changed weights act once what was computed from them is forgotten."""
    pipeline = ZImagePipeline.load(folders["tiny"], dtype=torch.float32, device=CPU)
    transformer = pipeline.transformer

    def modulation():
        return transformer.modulations.get(transformer, [0.75], torch.tensor([0.5]), torch.float32)[0].scale.clone()

    before = modulation()
    transformer.all_final_layer["2-1"].adaLN_modulation[1].weight.mul_(2)
    assert torch.equal(modulation(), before), "remembered: this is what has to be forgotten"
    pipeline.forget_derived()
    assert not torch.equal(modulation(), before)
