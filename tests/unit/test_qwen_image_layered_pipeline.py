"""Our Qwen-Image-Layered pipeline against diffusers' own, called directly and through the contract."""

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered

from tests import contract
from tests.model_builders.qwen_image_edit import build_qwen_image_layered
from tests.unit.conditioned_checks import ConditionedChecks, picture, shrink
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.pipelines.base import generator_of
from vllm_cfg_plugin.pipelines.qwen_image import QwenImageLayeredPipeline
from vllm_cfg_plugin.pipelines.registry import describe


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    shrink(monkeypatch, pipeline_qwenimage_layered)


class TestLayered(ConditionedChecks):
    ours = QwenImageLayeredPipeline
    # The sizes that diffusers brings these images to.
    cases = (
        ([picture(96, 64, 1, "RGBA")], {"layers": 4, "height": 64, "width": 96}),
        ([picture(50, 100, 2, "RGBA")], {"layers": 1, "height": 128, "width": 64}),
        ([picture(64, 64, 3, "RGBA")], {"layers": 2, "height": 64, "width": 64, "cfg_normalize": True}),
    )

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        return str(build_qwen_image_layered(tmp_path_factory.mktemp("layered")))

    def direct(self, own):
        return {name: value for name, value in own.items() if name not in ("height", "width")}

    def test_the_size_follows_the_image_or_the_request(self, pipelines, folder, monkeypatch):
        _, ours = pipelines
        info = describe(Checkpoint(folder))
        monkeypatch.undo()
        assert info.default_size([(300, 200)]) == (512, 768)
        request = contract.make_request(folder, "a cat", [picture(300, 200)], height=48, width=80, layers=3)
        assert (request.image_tokens, request.condition_tokens) == (4 * 15, 15)
        assert ours.decode(ours.draw_noise(request, generator_of(request)), request).shape == (3, 48, 80, 4)

    def test_a_direct_call_takes_a_size_or_the_resolution(self, pipelines):
        _, ours = pipelines
        arguments = {"image": picture(64, 64), "prompt": "a cat", "num_inference_steps": 2, "layers": 1}
        assert ours(**arguments, height=32, width=48).images[0][0].size == (48, 32)
        assert ours(**arguments, resolution=1024).images[0][0].size == (128, 128)

    def test_an_opaque_image_gets_an_alpha_channel(self, pipelines, folder):
        _, ours = pipelines
        opaque = picture(64, 48)
        with_alpha, without = (
            contract.make_request(folder, "a cat", [image]) for image in (opaque.convert("RGBA"), opaque)
        )
        assert without.images[0].mode == "RGB"
        assert torch.equal(ours.encode_images(with_alpha)[0], ours.encode_images(without)[0])

    def test_layers_are_counted_and_checked(self, folder):
        assert contract.make_request(folder, "a cat", [picture(64, 64)]).layers == 2
        with pytest.raises(InvalidRequestError, match="layers=0"):
            contract.make_request(folder, "a cat", [picture(64, 64)], layers=0)

    def test_an_empty_prompt_is_captioned_like_diffusers(self, pipelines, folder):
        reference, ours = pipelines
        image = picture(96, 64, 1, "RGBA")
        request = contract.make_request(folder, "", [image], negative_prompt="", true_cfg_scale=3.0)
        caption = reference.get_image_caption(image, device="cpu", use_en_prompt=False)
        assert caption
        embeds = [ours.encode_branch(request, branch).tokens for branch in range(2)]
        assert torch.equal(embeds[0], reference.encode_prompt(caption, max_sequence_length=512)[0][0])
        assert torch.equal(embeds[1], reference.encode_prompt("")[0][0])
        assert request.embeds_key(0) != request.embeds_key(1)
        arguments = {"image": image, "num_inference_steps": 2, "layers": 1, "true_cfg_scale": 1.0}
        called, as_written = (
            ours(prompt=text, **arguments, generator=torch.Generator().manual_seed(1)).images[0][0]
            for text in ("", caption)
        )
        assert called.tobytes() == as_written.tobytes()
        assert len(embeds[0]) <= request.text_tokens[0] == 512
        other = contract.make_request(folder, " ", [picture(96, 64, 2, "RGBA")])
        assert request.embeds_key(0) != other.embeds_key(0)
        assert not contract.make_request(folder, "  ", [image]).is_captioned
