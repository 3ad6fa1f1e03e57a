"""The images schemas alone: nulls, explicit zeros, refusals."""

import pytest
from msgspec import UNSET
from pydantic import ValidationError

from tests.unit.fakes import INFO
from vllm_cfg_plugin.entrypoints.fields import schema_error
from vllm_cfg_plugin.entrypoints.images.schema import ImagesRequest, Usage
from vllm_cfg_plugin.errors import InvalidRequestError


def parse(**fields) -> ImagesRequest:
    body = ImagesRequest.model_validate({"prompt": "a cat", **fields})
    body.check(INFO)
    return body


OPTIONAL = [name for name in ImagesRequest.model_fields if name != "prompt"]


def test_explicit_nulls_are_defaults():
    body = parse(**dict.fromkeys([*OPTIONAL, "a_field_of_a_newer_client"]))
    params = body.to_params(INFO)
    assert params.height is params.width is params.num_inference_steps is params.true_cfg_scale is UNSET
    assert (params.n, params.seed, body.format) == (1, UNSET, "png")


def test_a_null_negative_prompt_is_none_an_absent_one_default():
    """A null negative prompt means none and an absent one the default."""
    assert parse(negative_prompt=None).to_params(INFO).negative_prompt is None
    assert parse().to_params(INFO).negative_prompt is UNSET
    assert parse(negative_prompt="").to_params(INFO).negative_prompt == ""


def test_explicit_zero_is_kept():
    params = parse(true_cfg_scale=0, guidance_scale=0.0, seed=0, num_inference_steps=0, n=0).to_params(INFO)
    assert (params.true_cfg_scale, params.guidance_scale, params.seed) == (0, 0, 0)
    assert (params.num_inference_steps, params.n) == (0, 0)


def test_size_is_width_by_height():
    params = parse(size="96x64").to_params(INFO)
    assert (params.width, params.height) == (96, 64)
    assert parse(size="auto").to_params(INFO).height is UNSET


@pytest.mark.parametrize(
    "size", ["", "64", "64X64", "64x", "-64x64", "64.0x64", "64x64x3", " 64x64", "1" * 5000 + "x1"]
)
def test_other_sizes_are_refused(size):
    with pytest.raises(InvalidRequestError) as refused:
        parse(size=size).to_params(INFO)
    assert refused.value.param == "size"


@pytest.mark.parametrize(
    ("sent", "image_format"), [(None, "png"), ("png", "png"), ("jpg", "jpeg"), ("jpeg", "jpeg"), ("webp", "webp")]
)
def test_output_formats(sent, image_format):
    assert parse(output_format=sent).format == image_format


def test_harmless_fields_are_accepted():
    parse(style="vivid", moderation="low", watermark=False, metadata={"trace": 1})
    parse(user="u", safety_identifier="s", moderation="low", quality="auto", background="opaque", stream=False)
    parse(partial_images=0, response_format="b64_json", model="m", output_format="webp", output_compression=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", "file"),
        ("output_format", "gif"),
        ("quality", "best"),
        ("background", "transparent"),
        ("watermark", True),
        ("partial_images", 2),
        ("output_compression", 50),  # of a PNG
        ("mask", "m.png"),
        ("true_cfg_scal", 3.0),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequestError) as refused:
        parse(**{field: value})
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("quality", "name", "steps"),
    [
        (None, "high", UNSET),
        ("auto", "high", UNSET),
        ("standard", "high", UNSET),
        ("low", "low", 10),
        ("medium", "medium", 15),
        ("hd", "xhigh", 30),
        ("max", "max", 40),
    ],
)
def test_quality_is_a_share_of_the_models_own_steps(quality, name, steps):
    body = parse(quality=quality)
    assert (body.quality_name, body.to_params(INFO).num_inference_steps) == (name, steps)


def test_quality_and_steps_that_disagree_are_refused():
    assert parse(quality="high", num_inference_steps=5).to_params(INFO).num_inference_steps == 5
    with pytest.raises(InvalidRequestError, match=r'quality="low" .* beside num_inference_steps'):
        parse(quality="low", num_inference_steps=5).to_params(INFO)


def test_a_stream_has_no_links():
    with pytest.raises(InvalidRequestError, match=r'"b64_json" where "stream"'):
        parse(stream=True, response_format="url")


def test_a_misspelt_field_gets_a_hint():
    with pytest.raises(InvalidRequestError, match="did you mean true_cfg_scale"):
        parse(true_cfg_scal=3.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 3),
        ("prompt", None),
        ("prompt", ["a"]),
        ("prompt", "x" * 32_001),
        ("n", "2"),
        ("n", True),
        ("n", 1.5),
        ("seed", "7"),
        ("size", 512),
        ("num_inference_steps", 2.5),
        ("true_cfg_scale", "4"),
        ("output_compression", 101),
        ("negative_prompt", 0),
    ],
)
def test_wrong_types_name_the_field(field, value):
    with pytest.raises(ValidationError) as refused:
        parse(**{field: value})
    error = schema_error(refused.value.errors()[0])
    assert error.param == field
    assert str(error).startswith(f"{field}=")
    assert len(str(error)) < 400


def test_sides_are_reported_as_size():
    body = parse(size="63x64")
    error = body.in_request_terms(InvalidRequestError("width", 63, "a positive multiple of 8"))
    assert error.param == "size"
    assert "63x64" in str(error)
    assert "multiple of 8" in str(error)
    other = InvalidRequestError("n", 0, "an integer")
    assert body.in_request_terms(other) is other


def test_usage_adds_up():
    usage = Usage.of(text_tokens=18, condition_tokens=30, image_tokens=128)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens == 176
    assert (usage.input_tokens_details.text_tokens, usage.input_tokens_details.image_tokens) == (18, 30)
