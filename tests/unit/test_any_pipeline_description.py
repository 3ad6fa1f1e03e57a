"""What pipeline classes of diffusers say of themselves: fields, sizes, images; and those that can't be served."""

import json

import diffusers
import pytest
from msgspec import UNSET

from tests.any_pipelines import ANY_PIPELINES
from tests.contract import make_request
from tests.families import picture
from vllm_cfg_plugin.checkpoint import MODEL_INDEX, Checkpoint
from vllm_cfg_plugin.errors import ConfigurationError, InvalidRequestError
from vllm_cfg_plugin.pipelines.any_pipeline.call_parameters import extra_fields, image_parameters
from vllm_cfg_plugin.pipelines.any_pipeline.outputs import arguments_of
from vllm_cfg_plugin.pipelines.registry import check_servable, describe

# class -> task, images, size_multiple, frames_per_latent, (height, width), steps, scale
SAID = {
    "StableDiffusionPipeline": ("text-to-image", (0, 0), 8, 1, (64, 64), 50, 7.5),
    "StableDiffusionXLPipeline": ("text-to-image", (0, 0), 8, 1, (64, 64), 50, 5.0),
    "StableDiffusionXLImg2ImgPipeline": ("image-to-image", (1, 1), 4, 1, (64, 64), 50, 5.0),
    "StableDiffusionXLInpaintPipeline": ("image-to-image", (2, 2), 8, 1, (64, 64), 50, 7.5),
    "StableDiffusionXLInstructPix2PixPipeline": ("image-to-image", (1, 1), 4, 1, (64, 64), 100, 5.0),
    "Lumina2Pipeline": ("text-to-image", (0, 0), 16, 1, (128, 128), 30, 4.0),
    "SanaPipeline": ("text-to-image", (0, 0), 32, 1, (1024, 1024), 20, 4.5),
    "Kandinsky5T2VPipeline": ("text-to-video", (0, 0), 16, 4, (512, 768), 50, 5.0),
    "CogView4Pipeline": ("text-to-image", (0, 0), 16, 1, (128, 128), 50, 5.0),
    "HiDreamImagePipeline": ("text-to-image", (0, 0), 4, 1, (256, 256), 50, 5.0),
    "PixArtSigmaPipeline": ("text-to-image", (0, 0), 16, 1, (128, 128), 20, 4.5),
    "CogVideoXPipeline": ("text-to-video", (0, 0), 16, 4, (64, 64), 50, 6),
    "LTXPipeline": ("text-to-video", (0, 0), 32, 8, (512, 704), 50, 3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family.class_name: family.build(folder / family.class_name) for family in ANY_PIPELINES}


@pytest.mark.parametrize("family", ANY_PIPELINES, ids=lambda family: family.class_name)
def test_a_class_says_what_it_can_do(family, folders):
    checkpoint = Checkpoint(str(folders[family.class_name]))
    check_servable(checkpoint)
    info, defaults = describe(checkpoint), describe(checkpoint).default_params
    said = (
        info.task,
        (info.min_images, info.max_images),
        info.size_multiple,
        info.frames_per_latent,
        (defaults.height, defaults.width),
        defaults.num_inference_steps,
        defaults.guidance_scale,
    )
    assert said == SAID[family.class_name]


def test_a_request_becomes_the_arguments_of_a_call(folders):
    request = make_request(
        folders["StableDiffusionXLImg2ImgPipeline"],
        "a cat",
        [picture(70, 50)],
        guidance_scale=4.0,
        strength=0.5,
        num_inference_steps=9,
        clip_skip=1,
    )
    asked = {"guidance_scale": 4.0, "strength": 0.5, "num_inference_steps": 9, "clip_skip": 1}
    assert request.call == asked  # no size: the image's own
    assert (request.height, request.width) == (48, 68)
    assert request.num_timesteps == 5
    assert len(request.prompts) == 2


def test_a_list_of_json_is_a_tuple_where_the_class_takes_one(folders):
    folder, cls = folders["StableDiffusionXLPipeline"], diffusers.StableDiffusionXLPipeline
    request = make_request(folder, "a cat", crops_coords_top_left=[4, 8], prompt_2=["a dog"])
    arguments = arguments_of(cls, request)
    assert arguments["crops_coords_top_left"] == (4, 8)
    assert arguments["prompt_2"] == ["a dog"]


def test_an_absent_negative_prompt_is_left_to_the_pipeline(folders):
    folder = folders["StableDiffusionXLPipeline"]
    assert "negative_prompt" not in make_request(folder, "a cat").call
    assert make_request(folder, "a cat", negative_prompt="").call["negative_prompt"] == ""
    assert len(make_request(folder, "a cat", guidance_scale=1.0).prompts) == 1


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"guidance_interval": (0.0, 0.5)}, "guidance_interval.*does not take it"),
        ({"cache": "static"}, "cache.*does not take it"),
        ({"cache_order": 1}, "cache_order.*does not take it"),
        ({"cfg_normalize": True}, "cfg_normalize.*does not read it"),
        ({"true_cfg_scale": 2.0}, "this model's guidance scale is guidance_scale"),
        ({"num_frames": 5}, "num_frames.*this model has none"),
        ({"height": 60}, "a positive multiple of 8"),
    ],
)
def test_what_a_class_does_not_read_is_refused(folders, params, said):
    with pytest.raises(InvalidRequestError, match=said):
        make_request(folders["StableDiffusionXLPipeline"], "a cat", **params)


def test_a_field_that_some_families_lack_may_be_one_of_the_class(folders):
    request = make_request(folders["StableDiffusionXLPipeline"], "a cat", guidance_rescale=0.5)
    assert request.call["guidance_rescale"] == 0.5


def test_tensors_and_callbacks_are_no_fields():
    fields = extra_fields(diffusers.StableDiffusionXLInpaintPipeline)
    assert fields["strength"] == "float"
    assert fields["target_size"].startswith("tuple[int, int]")
    refused = {"latents", "prompt_embeds", "generator", "callback_on_step_end", "return_dict", "output_type", "image"}
    assert not refused & set(fields)
    assert image_parameters(diffusers.StableDiffusionXLInpaintPipeline) == ["image", "mask_image"]


@pytest.mark.parametrize(
    ("class_name", "problem"),
    [
        ("DDPMPipeline", "has no prompt"),
        ("StableAudioPipeline", "neither images nor videos"),
        ("StableVideoDiffusionPipeline", "has no prompt"),
        ("PaintByExamplePipeline", "has no prompt"),
    ],
)
def test_a_class_that_no_request_satisfies_is_refused(tmp_path, class_name, problem):
    index = {"_class_name": class_name, "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / MODEL_INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match=f"{class_name}, which can't be served: .*{problem}"):
        describe(Checkpoint(str(tmp_path)))


def test_unset_defaults_stay_unset(folders):
    info = describe(Checkpoint(str(folders["StableDiffusionXLPipeline"])))
    assert info.default_params.num_frames is UNSET
    assert info.default_params.negative_prompt is UNSET
