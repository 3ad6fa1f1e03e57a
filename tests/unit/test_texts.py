"""Texts as diffusers takes them, family by family: empty ones, and as many tokens as its own pipeline makes of one."""

from dataclasses import replace

import pytest
import torch

from tests import contract
from tests.families import FAMILIES, call, load
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionParams, RequestLimits
from vllm_cfg_plugin.pipelines.registry import describe
from vllm_cfg_plugin.resolve import resolve_requests
from vllm_cfg_plugin.tokens import TokenCounter

CLASSES = list({family.class_name: family for family in FAMILIES}.values())
# Editing a million pixels takes too long here; Layered has a test of its own.
QUICK = [family for family in CLASSES if "Edit" not in family.class_name and "Layered" not in family.class_name]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    folders = {}

    def get(family):
        if family.class_name not in folders:
            folders[family.class_name] = family.build(tmp_path_factory.mktemp(family.class_name))
        return folders[family.class_name]

    return get


@pytest.mark.parametrize("family", QUICK, ids=lambda family: family.class_name)
def test_blank_prompts_like_diffusers(family, folder_of):
    folder = folder_of(family)
    reference, ours = family.reference(folder), load(folder)
    case = family.cases[0]
    for prompt in ("", " \n"):
        params = {**case.params, "num_inference_steps": 2}
        expected = call(reference, replace(case, prompt=prompt, params=params), seed=5)
        request = contract.make_request(folder, prompt, case.images, seed=5, **params)
        latents = family.to_reference(ours, contract.generate(ours, request), request)
        torch.testing.assert_close(
            latents, torch.as_tensor(expected[0])[None].reshape(latents.shape), rtol=0, atol=1e-4
        )


def resolver(folder):
    """(resolve(prompt, **params) -> a request, as the front end resolves it; the model's counter of tokens)"""
    checkpoint = Checkpoint(str(folder))
    described = replace(describe(checkpoint), min_images=0)
    count = TokenCounter.of(checkpoint, described.text)

    def resolve(prompt, **params):
        asked = DiffusionParams(height=64, width=64, **params)
        return resolve_requests(prompt, asked, described, RequestLimits(), count)[0]

    return resolve, count


# What tells a counter apart that does not do to a text what the pipeline does.
ODD_TEXTS = ("&amp;" * 200, "&amp;amp; a", " a \n\t b ", "â€œquotedâ€\x9d", "don't 'say OPEN' now", "a" * 50)


@pytest.mark.parametrize("name", ["WanPipeline", "WanImageToVideoPipeline"])
def test_wan_counts_what_it_has_cleaned(folder_of, name):
    [family] = [family for family in CLASSES if family.class_name == name]
    folder = folder_of(family)
    pipeline, count = load(folder), TokenCounter.of(Checkpoint(str(folder)), describe(Checkpoint(str(folder))).text)
    for text in ODD_TEXTS:
        embeds = pipeline._get_t5_prompt_embeds(text, 1, 512, torch.device("cpu"))[0]
        assert count(text) == int(embeds.abs().sum(dim=1).count_nonzero()), text
    assert resolver(folder)[0]("&amp;" * 200)


DEFAULTS = {
    "FluxPipeline": (512, 512),
    "QwenImageEditPipeline": (1024, 1024),  # whose prompts diffusers does not cut
    "QwenImageEditPlusPipeline": (1024, 1024),
    "QwenImageLayeredPipeline": (512, 1024),
    "QwenImagePipeline": (512, 1024),
    "StableDiffusion3Pipeline": (256, 512),
    "WanImageToVideoPipeline": (512, 512),
    "WanPipeline": (512, 512),
    "ZImagePipeline": (512, 992),
}


@pytest.mark.parametrize("family", CLASSES, ids=lambda family: family.class_name)
def test_limits_of_texts(family, folder_of):
    """Diffusers' default, and more by name where its call has `max_sequence_length`."""
    folder = folder_of(family)
    resolve, count_of = resolver(folder)
    if family.class_name not in DEFAULTS:
        with pytest.raises(InvalidRequestError, match=r"max_sequence_length=100 .* leave it out"):
            resolve("a", max_sequence_length=100)
        return
    assert resolve(" ").prompts[0] == " "
    default, most = DEFAULTS[family.class_name]
    with pytest.raises(InvalidRequestError, match=f"at most {default} tokens long, and this one has"):
        resolve("cat " * 1100)
    with pytest.raises(InvalidRequestError, match=f"an integer from 1 to {most}"):
        resolve("a", max_sequence_length=most + 1)
    if most > default:
        long = next(text for text in ("cat " * count for count in range(default)) if count_of(text) > default)
        assert resolve(long, max_sequence_length=most).max_sequence_length == most
        with pytest.raises(InvalidRequestError, match=f"max_sequence_length may be up to {most}"):
            resolve(long)


@pytest.mark.parametrize("name", ["QwenImagePipeline", "FluxPipeline", "StableDiffusion3Pipeline", "WanPipeline"])
def test_a_text_limit_acts_like_diffusers(folder_of, name):
    [family] = [family for family in CLASSES if family.class_name == name]
    folder = folder_of(family)
    limit, cats = (1024, 300) if name.startswith("Qwen") else (300, 70)
    case = replace(family.cases[0], prompt="cat " * cats)
    params = {**case.params, "num_inference_steps": 2, "max_sequence_length": limit}
    expected = call(family.reference(folder), replace(case, params=params), seed=5)
    ours = load(folder)
    request = contract.make_request(folder, case.prompt, seed=5, **params)
    contract.assert_tokens_are_counted(ours, request)
    torch.testing.assert_close(contract.generate(ours, request), expected, rtol=0, atol=1e-4)
