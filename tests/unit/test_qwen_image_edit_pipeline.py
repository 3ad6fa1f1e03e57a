"""Our Qwen-Image-Edit and -Edit-Plus pipelines against diffusers' own, called directly and through the contract."""

import json

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image

from tests import contract
from tests.model_builders.qwen_image_edit import build_qwen_image_edit, build_qwen_image_edit_plus
from tests.unit.conditioned_checks import ConditionedChecks, load, picture, shrink
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.qwen_image import QwenImageEditPipeline, QwenImageEditPlusPipeline
from vllm_cfg_plugin.pipelines.registry import describe

SIZE = {"height": 64, "width": 64}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    shrink(monkeypatch, pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus)


class TestEdit(ConditionedChecks):
    ours = QwenImageEditPipeline
    cases = (
        ([picture(96, 64, 1)], SIZE),
        ([picture(60, 110, 2)], {"height": 32, "width": 96}),
        ([picture(64, 64, 3)], {"height": 80, "width": 48}),
    )

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        return str(build_qwen_image_edit(tmp_path_factory.mktemp("edit")))


class TestEditPlus(ConditionedChecks):
    """With `zero_cond_t`, as Qwen-Image-Edit-2511."""

    ours = QwenImageEditPlusPipeline
    cases = (
        ([picture(96, 64, 1)], SIZE),
        ([picture(60, 110, 2), picture(64, 64, 3)], {"height": 32, "width": 96}),
        ([picture(64, 64, 3), picture(40, 30, 4), picture(30, 70, 5)], {"height": 80, "width": 48}),
    )

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        return str(build_qwen_image_edit_plus(tmp_path_factory.mktemp("edit_plus")))


class TestEditPlusWithoutZeroCond(TestEditPlus):
    """As Qwen-Image-Edit-2509."""

    cases = TestEditPlus.cases[1:2]

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        return str(build_qwen_image_edit_plus(tmp_path_factory.mktemp("edit_plus"), zero_cond_t=False))


@pytest.fixture(scope="module")
def edit_folder(tmp_path_factory):
    return build_qwen_image_edit(tmp_path_factory.mktemp("edit"))


@pytest.fixture(scope="module")
def edit(edit_folder):
    return load(QwenImageEditPipeline, edit_folder)


def test_at_diffusers_own_areas(edit, edit_folder, monkeypatch):
    monkeypatch.undo()
    reference, ours = edit
    image = picture(300, 200)
    request = contract.make_request(edit_folder, "a cat", [image], **SIZE, num_inference_steps=2, seed=1)
    assert request.condition_tokens == 78 * 52  # 1248 x 832 pixels
    expected = reference(
        image=image,
        prompt="a cat",
        **SIZE,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    torch.testing.assert_close(contract.generate(ours, request), expected, rtol=0, atol=1e-4)


def test_without_a_size_the_result_is_shaped_like_the_last_image(tmp_path, monkeypatch):
    monkeypatch.undo()
    folder = build_qwen_image_edit_plus(tmp_path / "model")
    request = contract.make_request(folder, "a cat", [picture(50, 50), picture(300, 200)])
    assert (request.width, request.height) == (1248, 832)
    assert request.image_tokens == 78 * 52
    assert request.condition_tokens == 64 * 64 + 78 * 52


def test_an_alpha_channel_is_dropped(edit, edit_folder):
    _, ours = edit
    opaque = picture(64, 48)
    clear = Image.merge("RGBA", (*opaque.split(), Image.linear_gradient("L").resize(opaque.size)))
    with_alpha, without = (contract.make_request(edit_folder, "a cat", [image]) for image in (clear, opaque))
    assert with_alpha.images[0].mode == "RGBA"
    assert torch.equal(ours.encode_images(with_alpha)[0], ours.encode_images(without)[0])
    assert torch.equal(ours.encode_branch(with_alpha, 0).tokens, ours.encode_branch(without, 0).tokens)


def test_an_embedding_belongs_to_its_image(edit_folder):
    first, second = (contract.make_request(edit_folder, "a cat", [picture(64, 48, seed)]) for seed in (1, 2))
    assert first.embeds_key(0) != second.embeds_key(0)


def test_images_of_a_request_to_the_plus_model_are_numbered(tmp_path):
    folder = build_qwen_image_edit_plus(tmp_path / "model")
    rules = describe(Checkpoint(str(folder))).text
    marks = "<|vision_start|><|image_pad|><|vision_end|>"
    assert rules.with_images("a cat", 2) == f"Picture 1: {marks}Picture 2: {marks}a cat"


def test_a_checkpoint_without_a_processor_is_refused(tmp_path):
    folder = build_qwen_image_edit(tmp_path / "model")
    (folder / "processor" / "processor_config.json").unlink()
    with pytest.raises(ConfigurationError, match="its processor/ can't be loaded"):
        describe(Checkpoint(str(folder)))


@pytest.mark.parametrize("saved_by", ["transformers 4", "transformers 5"])
def test_a_processor_that_was_saved_with_videos_is_loaded(edit, edit_folder, tmp_path, saved_by):
    """As published checkpoints have them: the part for videos needs torchvision, and editing does not."""
    _, ours = edit
    folder = build_qwen_image_edit(tmp_path / "model") / "processor"
    config = json.loads((folder / "processor_config.json").read_text())
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 14, "merge_size": 2}
    if saved_by == "transformers 5":
        (folder / "processor_config.json").write_text(json.dumps(config | {"video_processor": videos}))
    else:
        (folder / "processor_config.json").unlink()
        images = config["image_processor"] | {"image_processor_type": "Qwen2VLImageProcessorFast"}
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
        (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    _, loaded = load(QwenImageEditPipeline, folder.parent)
    requests = [contract.make_request(path, "a cat", [picture(64, 48)]) for path in (edit_folder, folder.parent)]
    assert requests[0].text_tokens == requests[1].text_tokens
    embeds = [pipeline.encode_branch(requests[0], 0).tokens for pipeline in (ours, loaded)]
    assert torch.equal(*embeds)
