"""Fields of other clients: each is refused by a message that names ours, and no object of Python shows in any."""

from dataclasses import replace

import pytest

from tests.unit.edits import CAT, EDIT_INFO, assert_refused, edit
from tests.unit.fakes import IMAGE_TO_VIDEO_INFO, INFO, VIDEO_INFO
from tests.unit.http_app import GENERATIONS, FakeEngine, make_app, send

VIDEOS = "/v1/videos"


@pytest.fixture
def app_of(monkeypatch):
    return lambda info: make_app(FakeEngine(), monkeypatch, info)


def refusal(app, path, name, value=1):
    response = send(app, path, json={"prompt": "a cat", name: value})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == name
    return response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("steps", "did you mean num_inference_steps?"),
        ("num_steps", "did you mean num_inference_steps?"),
        ("inferenceSteps", "did you mean num_inference_steps?"),
        ("numInferenceSteps", "did you mean num_inference_steps?"),
        ("cfg_scale", "did you mean true_cfg_scale?"),
        ("cfgScale", "did you mean true_cfg_scale?"),
        ("cfg", "did you mean true_cfg_scale?"),
        ("scale", "did you mean true_cfg_scale?"),
        ("guidance", "did you mean true_cfg_scale?"),
        ("height", 'size is the field, as "WIDTHxHEIGHT"'),
        ("width", 'size is the field, as "WIDTHxHEIGHT"'),
        ("aspect_ratio", 'size is the field, as "WIDTHxHEIGHT"'),
        ("negativePrompt", "did you mean negative_prompt?"),
        ("neg_prompt", "did you mean negative_prompt?"),
        ("batch_size", "n is the number of results"),
        ("numImages", "n is the number of results"),
        ("sampler", "the noise scheduler is the checkpoint's own"),
        ("sampler_name", "the noise scheduler is the checkpoint's own"),
        ("scheduler", "the noise scheduler is the checkpoint's own"),
        ("random_seed", "did you mean seed?"),
        ("format", "did you mean output_format?"),
        ("true_cfg_scal", "did you mean true_cfg_scale?"),
        ("mask", "POST /v1/images/edits has it"),
        ("input_image", "POST /v1/images/edits takes images"),
        ("loras", "did you mean lora?"),
        ("cfg-scale", "did you mean true_cfg_scale?"),
        ("cfg_rescale", "did you mean guidance_rescale?"),
        ("guidance_start", "did you mean guidance_interval?"),
        ("jpeg_quality", "did you mean output_compression?"),
        ("samples", "n is the number of results"),
        ("n_iter", "n is the number of results"),
    ],
)
def test_images(app_of, name, says):
    assert says in refusal(app_of(INFO), GENERATIONS, name)


def test_a_text_limit_is_hinted_at_where_the_model_reads_one(app_of):
    info = replace(INFO, options=frozenset({"max_sequence_length"}))
    assert "did you mean max_sequence_length?" in refusal(app_of(info), GENERATIONS, "max_length")


def test_what_no_field_is_like_gets_no_hint(app_of):
    assert refusal(app_of(INFO), GENERATIONS, "xyzzy").endswith("no field of that name")


@pytest.mark.parametrize(
    ("info", "path", "name", "meant"),
    [
        (INFO, GENERATIONS, "guidanceScale", "true_cfg_scale"),
        (INFO, GENERATIONS, "guidance_scal", "true_cfg_scale"),
        (INFO, GENERATIONS, "trueCfgScale", "true_cfg_scale"),
        (VIDEO_INFO, VIDEOS, "trueCfgScale", "guidance_scale"),
        (VIDEO_INFO, VIDEOS, "true_cfg_scal", "guidance_scale"),
        (replace(INFO, distilled_scale="guidance_scale"), GENERATIONS, "guidanceScale", "guidance_scale"),
        (replace(INFO, distilled_scale="guidance_scale"), GENERATIONS, "trueCfgScale", "true_cfg_scale"),
    ],
)
def test_a_scale_that_the_model_reads_not_was_not_meant(app_of, info, path, name, meant):
    """A scale that the model does not read is not what was meant."""
    assert refusal(app_of(info), path, name).endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize("name", ["combineRule", "combin_rule", "guidance_scal_2", "maxSequenceLength", "max_tokens"])
def test_no_hint_names_a_field_that_the_model_does_not_read(app_of, name):
    info = replace(INFO, options=frozenset(), guidance_fields=frozenset())
    assert "combine_rule" not in (message := refusal(app_of(info), GENERATIONS, name).partition(";")[2])
    assert "_2" not in message
    assert "max_sequence" not in message


def test_no_hint_for_what_is_like_a_field_by_chance(app_of):
    response = edit(app_of(EDIT_INFO), {"sigmas": "1"})
    assert_refused(response, "sigmas", "sigmas=")
    assert response.json()["error"]["message"].endswith("no field of that name")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cfg_scale", "did you mean guidance_scale?"),
        ("frames", "did you mean num_frames?"),
        ("videoLength", "did you mean num_frames?"),
        ("frame_rate", "did you mean fps?"),
        ("duration", "did you mean seconds?"),
        ("image", "did you mean input_reference?"),
        ("init_image", "did you mean input_reference?"),
        ("num_videos_per_prompt", "no field of that name"),
    ],
)
def test_videos(app_of, name, says):
    assert says in refusal(app_of(VIDEO_INFO), VIDEOS, name)


def test_a_last_image_is_the_second_reference(app_of):
    both = replace(IMAGE_TO_VIDEO_INFO, max_images=2)
    assert "a last image is the second input_reference" in refusal(app_of(both), VIDEOS, "last_image", "x")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"partial_images": 1}, "partial_images=1 "),
        ({"watermark": True}, "watermark=true "),
        ({"n": False}, "n=false "),
        ({"prompt": None}, "prompt=null "),
        ({"guidance_interval": [0.5, True]}, "guidance_interval[1]=true "),
        ({"steps": {"first": None, "all": [True]}}, 'steps={"first": null, "all": [true]} '),
        ({"size": "64"}, 'size="64" '),
    ],
)
def test_values_are_shown_as_they_were_sent(app_of, change, shown):
    response = send(app_of(INFO), GENERATIONS, json={"prompt": "a cat"} | change)
    assert response.json()["error"]["message"].startswith(shown)


@pytest.mark.parametrize("name", ["mask", "prompt", "seed", "size", "xyzzy"])
def test_a_file_where_none_belongs_is_called_a_file(app_of, name):
    files = [("image", ("cat.png", CAT)), (name, ("a.png", CAT))]
    fields = {"prompt": None} if name == "prompt" else {"seed": None} if name == "seed" else {}
    response = edit(app_of(EDIT_INFO), fields, files)
    assert_refused(response, name, f"{name}=file a.png, {len(CAT)} bytes")
    assert "UploadedFile" not in response.json()["error"]["message"]
