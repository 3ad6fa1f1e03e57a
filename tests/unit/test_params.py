"""Validation and defaults of one generation."""

import math
import pickle
from dataclasses import replace

import pytest
from msgspec import structs

from tests.unit.fakes import INFO, LIMITS
from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import MAX_SEED, MIN_SEED, DiffusionParams, ImageInput
from vllm_cfg_plugin.resolve import resolve_requests


def resolve(prompt="a cat", info=INFO, **fields):
    return resolve_requests(prompt, DiffusionParams(**fields), info, LIMITS, count_tokens=len)


def test_unset_fields_take_the_models_defaults():
    (request,) = resolve()
    assert (request.height, request.width, request.num_inference_steps) == (64, 64, 20)
    assert request.prompts == ["a cat"]
    assert request.text_tokens == [5]
    assert request.image_tokens == 64
    assert not request.guided
    assert request.guidance_off == ""  # nobody asked for it


def test_guided_requests_have_two_branches():
    (request,) = resolve(negative_prompt="", true_cfg_scale=3)
    assert request.prompts == ["a cat", ""]
    assert request.text_tokens == [5, 0]
    assert request.guided
    assert request.guidance.scale == 3.0


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_small_scales_are_respected_and_switch_guidance_off(scale):
    (request,) = resolve(negative_prompt="bad", true_cfg_scale=scale)
    assert request.guidance.scale == scale
    assert not request.guided
    assert "not above 1" in request.guidance_off


@pytest.mark.parametrize(("given", "scale"), [(0, 1.0), (0.5, 1.5), (5, 6.0)])
def test_a_scale_that_counts_from_another_number(given, scale):
    """Z-Image's guidance_scale is that of `pos + scale * (pos - neg)`: on above 0."""
    info = PipelineInfo(**vars(INFO) | {"cfg_scale_offset": 1.0})
    (request,) = resolve(info=info, negative_prompt="bad", true_cfg_scale=given)
    assert request.guidance.scale == scale
    assert request.guided == (given > 0)
    assert request.guidance_off == (
        "" if given else "a negative prompt was given, but true_cfg_scale is 0, not above 0"
    )


def test_a_scale_without_negative_prompt_says_why_it_is_off():
    """A scale without negative prompt says why guidance is off."""
    (request,) = resolve(true_cfg_scale=4.0)
    assert "no negative prompt" in request.guidance_off


def test_an_interval_between_two_steps_says_why_guidance_is_off():
    asked = {"negative_prompt": "bad", "true_cfg_scale": 4.0, "num_inference_steps": 4}
    (request,) = resolve(**asked, guidance_interval=(0.3, 0.45))
    assert not request.guided
    assert request.guidance_off == "none of 4 steps is in the guidance interval [0.3, 0.45]"
    (request,) = resolve(**asked, guidance_interval=(0.3, 0.5))
    assert (request.guided, request.guidance_off) == (True, "")


def test_null_negative_prompt_overrides_a_models_default():
    guided_by_default = PipelineInfo(
        **{
            **vars(INFO),
            "default_params": DiffusionParams(
                height=64, width=64, num_inference_steps=4, true_cfg_scale=4.0, negative_prompt=" "
            ),
        }
    )
    assert resolve(info=guided_by_default)[0].guided
    assert not resolve(info=guided_by_default, negative_prompt=None)[0].guided


def test_n_images_have_consecutive_seeds():
    assert [request.seed for request in resolve(n=3, seed=7)] == [7, 8, 9]
    assert [request.seed for request in resolve(n=2, seed=MAX_SEED - 1)] == [MAX_SEED - 1, MAX_SEED]
    assert resolve(seed=MIN_SEED)[0].seed == MIN_SEED
    assert resolve(seed=0)[0].seed == 0


def test_an_unset_seed_is_drawn():
    assert resolve(seed=None)[0].seed != resolve()[0].seed


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x" * 21}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"negative_prompt": 3}, "negative_prompt"),
        ({"negative_prompt": "x" * 21}, "negative_prompt"),
        ({"height": 0}, "height"),
        ({"width": -64}, "width"),
        ({"width": 65}, "width"),
        ({"height": 64.0}, "height"),
        ({"height": True}, "height"),
        ({"height": 512, "width": 512}, "size"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": True}, "n"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"true_cfg_scale": math.nan}, "true_cfg_scale"),
        ({"true_cfg_scale": math.inf}, "true_cfg_scale"),
        ({"true_cfg_scale": -1.0}, "true_cfg_scale"),
        ({"true_cfg_scale": "4"}, "true_cfg_scale"),
        ({"true_cfg_scale": 1e30}, "true_cfg_scale"),
        ({"true_cfg_scale": 10**400}, "true_cfg_scale"),  # which no float can hold
        ({"guidance_interval": (0, 10**400)}, "guidance_interval"),
        ({"guidance_scale": 4.0}, "guidance_scale"),  # this model's is true_cfg_scale
        ({"guidance_scale_2": 4.0}, "guidance_scale_2"),
        ({"num_frames": 5}, "num_frames"),
        ({"layers": 2}, "layers"),
        ({"max_sequence_length": 10}, "max_sequence_length"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval"),
        ({"guidance_interval": (-0.1, 0.5)}, "guidance_interval"),
        ({"guidance_interval": (0, 1.5)}, "guidance_interval"),
        ({"guidance_interval": (math.nan, 1)}, "guidance_interval"),
        ({"guidance_interval": 0.5}, "guidance_interval"),
        ({"guidance_interval": [0.1]}, "guidance_interval"),
        ({"combine_rule": "cfg++"}, "combine_rule"),
        ({"cfg_normalize": 1}, "cfg_normalize"),
        ({"guidance_rescale": 1.1}, "guidance_rescale"),
        ({"guidance_rescale": math.nan}, "guidance_rescale"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"seed": MIN_SEED - 1}, "seed"),
        ({"seed": MAX_SEED, "n": 2}, "seed"),
        ({"seed": 1.0}, "seed"),
    ],
)
def test_bad_values_name_field_and_value(fields, param):
    with pytest.raises(InvalidRequestError) as refused:
        resolve(**fields)
    assert refused.value.param == param
    assert str(refused.value).startswith(f"{param}=")
    assert "is not valid: " in str(refused.value)


def test_steps_that_can_not_be_set_are_an_error_of_the_field():
    """Steps that the noise scheduler can not be set to are an error of the field."""

    def count(steps):
        raise ValueError("it has 4 of its own")

    with pytest.raises(InvalidRequestError, match=r"num_inference_steps=3 .* another number: it has 4 of its own"):
        resolve(info=replace(INFO, num_timesteps=count), num_inference_steps=3)


def test_errors_survive_pickling_and_can_be_placed():
    error = InvalidRequestError("n", 0, "an integer from 1 to 10")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.param, str(copy)) == (error.param, str(error))
    placed = error.within("prompts[2].")
    assert placed.param == "prompts[2].n"
    assert str(placed).startswith("prompts[2].n=0 is not valid")


def test_branches_see_the_images_and_may_be_more_than_two():
    """Branches see the images and a family may add more of them."""
    info = replace(
        INFO,
        text=replace(INFO.text, sees_images=True),
        max_images=1,
        condition_tokens=lambda sizes: (16 * len(sizes), 3 * len(sizes)),
        with_more_branches=lambda request: structs.replace(
            request, prompts=[*request.prompts, "third"], text_tokens=[*request.text_tokens, 5]
        ),
    )
    images = [ImageInput("red", "RGB", 1, 1, b"\xff\x00\x00")]
    asked = DiffusionParams(negative_prompt="bad", true_cfg_scale=3.0, n=2)
    for request in resolve_requests("a cat", asked, info, LIMITS, len, images):
        assert request.prompts == ["a cat", "bad", "third"]
        assert request.text_tokens == [5 + 3, 3 + 3, 5]
        assert [request.sequence_tokens(branch) for branch in range(3)] == [64 + 16 + 8, 64 + 16 + 6, 64 + 16 + 5]
        assert [request.embeds_key(branch) for branch in range(2)] == [("a cat", 0, "red"), ("bad", 0, "red")]
    (unguided,) = resolve_requests("a cat", DiffusionParams(), info, LIMITS, len, images)
    assert unguided.prompts == ["a cat"]


@pytest.mark.parametrize("prompt", ["", " ", "\n\t "])
def test_a_blank_prompt_is_as_good_as_any(prompt):
    assert resolve(prompt)[0].prompts == [prompt]


LIMITED = replace(
    INFO,
    text=replace(INFO.text, pads=True, extra_tokens=7),
    options=frozenset({"max_sequence_length"}),
    default_params=structs.replace(INFO.default_params, max_sequence_length=10),
)


def test_a_text_limit_may_be_raised_by_name():
    with pytest.raises(
        InvalidRequestError, match=r"10 tokens long, and this one has 12; max_sequence_length.* up to 20"
    ):
        resolve("x" * 12, info=LIMITED)
    (request,) = resolve("x" * 12, info=LIMITED, max_sequence_length=12)
    assert (request.text_tokens, request.max_sequence_length) == ([12 + 7], 12)
    assert request.embeds_key(0) != resolve("x" * 12, info=LIMITED, max_sequence_length=13)[0].embeds_key(0)
    with pytest.raises(InvalidRequestError, match="12 tokens long, and this one has 13; max_sequence_length"):
        resolve("", info=LIMITED, max_sequence_length=12, negative_prompt="x" * 13)


@pytest.mark.parametrize("value", [0, 21, "12", 5.0, True])
def test_a_wrong_text_limit(value):
    with pytest.raises(InvalidRequestError, match=r"max_sequence_length=.* an integer from 1 to 20"):
        resolve(info=LIMITED, max_sequence_length=value)
