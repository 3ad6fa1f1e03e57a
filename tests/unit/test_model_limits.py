"""Where a model's positions end, requests end too: the largest that is let through runs, a larger one is refused."""

from functools import partial

import pytest
import torch

from tests.contract import branches_of, make_request, predict
from tests.model_builders.longcat_image import build_longcat_image_edit
from tests.model_builders.qwen_image import build_qwen_image
from tests.model_builders.qwen_image_edit import build_qwen_image_edit, build_qwen_image_edit_plus
from tests.model_builders.wan import build_wan
from tests.model_builders.z_image import build_z_image
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.pipelines.registry import describe, pipeline_class

BUILDERS = {"Qwen-Image": build_qwen_image, "Z-Image": build_z_image, "Wan": partial(build_wan, layout="2.1")}
# Longest text but for the template, so that nothing is left of the positions after it.
LONG_TEXT = {
    "Qwen-Image": {"prompt": "a " * 900, "max_sequence_length": 1024},
    "Z-Image": {"prompt": "a " * 900, "max_sequence_length": 992},
}


@pytest.fixture(scope="module", params=BUILDERS)
def model(request, tmp_path_factory):
    """(name, folder, pipeline, what it can do)"""
    folder = BUILDERS[request.param](tmp_path_factory.mktemp("model") / "model")
    checkpoint = Checkpoint(str(folder))
    pipeline = pipeline_class(checkpoint).load(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    return request.param, folder, pipeline, describe(checkpoint)


def run_one_branch(folder, pipeline, prompt, **params):
    request = make_request(folder, prompt, num_inference_steps=2, **params)
    with torch.inference_mode():
        (prediction,) = predict(pipeline, branches_of(pipeline, request)[:1])
    assert torch.isfinite(prediction).all()


@pytest.mark.parametrize("long", ["height", "width"])
def test_the_longest_side(model, long):
    name, folder, pipeline, info = model
    sides = dict.fromkeys(("height", "width"), info.size_multiple) | {long: info.max_side}
    frames = {"num_frames": 1} if info.produces == "video" else {}
    run_one_branch(folder, pipeline, **{"prompt": "a cat"} | LONG_TEXT.get(name, {}) | sides | frames)
    with pytest.raises(InvalidRequestError, match=f"at most {info.max_side}") as error:
        run_one_branch(folder, pipeline, "a cat", **sides | {long: info.max_side + info.size_multiple}, **frames)
    assert error.value.param == long


def test_the_longest_video(tmp_path):
    folder = build_wan(tmp_path / "wan", "2.1")
    checkpoint = Checkpoint(str(folder))
    info = describe(checkpoint)
    pipeline = pipeline_class(checkpoint).load(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    sides = dict.fromkeys(("height", "width"), info.size_multiple)
    run_one_branch(folder, pipeline, "a cat", **sides, num_frames=info.max_frames)
    with pytest.raises(InvalidRequestError, match=f"at most {info.max_frames}") as error:
        run_one_branch(folder, pipeline, "a cat", **sides, num_frames=info.max_frames + info.frames_per_latent)
    assert error.value.param == "num_frames"


@pytest.mark.parametrize("build", [build_qwen_image_edit, build_qwen_image_edit_plus, build_longcat_image_edit])
def test_a_prompt_names_no_image_that_is_not_there(tmp_path, build):
    """The text encoder would look for it."""
    rules = describe(Checkpoint(str(build(tmp_path / "model")))).text
    assert rules.sees_images
    assert {"<|image_pad|>", "<|video_pad|>"} <= set(rules.reserved)
