"""Our LongCat-Image pipelines against diffusers' own, called directly and through the engine's contract."""

import os
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from diffusers import LongCatImageEditPipeline as DiffusersLongCatImageEditPipeline
from diffusers import LongCatImagePipeline as DiffusersLongCatImagePipeline
from PIL import Image

from tests import contract
from tests.model_builders.longcat_image import build_longcat_image, build_longcat_image_edit
from tests.unit.pipeline_checks import ManyPromptsChecks, PipelineChecks
from vllm_cfg_plugin.errors import ConfigurationError, InvalidRequestError
from vllm_cfg_plugin.pipelines.longcat_image import LongCatImagePipeline
from vllm_cfg_plugin.pipelines.longcat_image.edit import LongCatImageEditPipeline, load_image_processor


class TestLongCatImage(ManyPromptsChecks):
    ours, reference = LongCatImagePipeline, DiffusersLongCatImagePipeline
    call_options: ClassVar = {"enable_prompt_rewrite": False}

    @pytest.fixture(scope="class", params=["tiny", "odd"])
    @classmethod
    def folder(cls, request, tmp_path_factory):
        return build_longcat_image(tmp_path_factory.mktemp("longcat"), size=request.param)

    @classmethod
    def load_options(cls, folder):
        return {"text_processor": None}  # which needs torchvision, to rewrite prompts

    @pytest.mark.parametrize("options", [{"enable_cfg_renorm": False}, {"cfg_renorm_min": 0.99}])
    def test_renormalisation_like_diffusers(self, pipelines, folder, options):
        reference, ours = pipelines
        request = self.request_for(folder, **self.guidance("ugly", 50.0))
        latents = self.call(ours, request, **options)
        torch.testing.assert_close(latents, self.call(reference, request, **options), rtol=0, atol=1e-4)
        assert not torch.equal(latents, self.call(ours, request))

    def test_a_prediction_is_shortened_but_never_lengthened(self, pipelines):
        _, ours = pipelines
        positive, combined = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[6.0, 8.0]]])
        assert ours.cfg_normalize_function(positive, combined).tolist() == [[[3.0, 4.0]]]
        assert ours.cfg_normalize_function(combined, positive).tolist() == [[[3.0, 4.0]]]
        assert ours.cfg_normalize_function(positive, combined, cfg_renorm_min=0.75).tolist() == [[[4.5, 6.0]]]

    def test_quoted_text_is_counted_letter_by_letter(self, pipelines, folder):
        _, ours = pipelines
        for quoted, fits in ((510, True), (513, False)):
            prompt = f'"{"house" * 200}"'[: quoted - 1] + '"'
            assert len(ours.tokenizer(prompt).input_ids) < 512
            if fits:
                assert contract.make_request(folder, prompt).text_tokens == [512, 512]
            else:
                with pytest.raises(InvalidRequestError, match=f"at most 512 tokens .* this one has {quoted}"):
                    contract.make_request(folder, prompt)

    def test_prompts_are_rewritten_where_a_call_asks_for_it(self, pipelines, monkeypatch):
        _, ours = pipelines
        options = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent", "return_dict": False}

        def call(prompt, **more):
            return ours(prompt, **options, **more, generator=torch.Generator().manual_seed(0))[0]

        monkeypatch.setattr(ours, "text_processor", object())
        monkeypatch.setattr(ours, "rewire_prompt", lambda prompt, device: [f"{prompt}, at night"])
        assert torch.equal(call("a cat", enable_prompt_rewrite=True), call("a cat, at night"))
        assert not torch.equal(call("a cat", enable_prompt_rewrite=True), call("a cat"))

    def test_prompts_are_not_rewritten_without_the_model_for_it(self, pipelines):
        _, ours = pipelines
        with pytest.raises(
            ConfigurationError, match="enable_prompt_rewrite=True needs the checkpoint's text_processor"
        ):
            ours("a cat", enable_prompt_rewrite=True)


class TestLongCatImageEdit(PipelineChecks):
    ours, reference = LongCatImageEditPipeline, DiffusersLongCatImageEditPipeline
    sizes: ClassVar = []

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        return build_longcat_image_edit(tmp_path_factory.mktemp("longcat_edit"))

    @classmethod
    def load_options(cls, folder):
        return {"text_processor": load_image_processor(str(folder))}

    @classmethod
    def images(cls, number):
        size = [(60, 60), (80, 20)][number % 2]
        return [Image.effect_mandelbrot(size, (-2 + number / 4, -1.5, 1, 1.5), 50).convert("RGB")]

    @torch.inference_mode()
    def test_the_text_sees_the_image(self, pipelines, folder):
        _, ours = pipelines
        first, other = (
            contract.make_request(folder, "a hat", self.images(number), num_inference_steps=2) for number in (0, 2)
        )
        assert first.embeds_key(0) != other.embeds_key(0)
        assert not torch.equal(ours.encode_branch(first, 0).tokens, ours.encode_branch(other, 0).tokens)

    def test_a_result_of_another_size(self, pipelines, folder):
        """diffusers has no such option; to the engine the size is a request's, the image's own size is calculated."""
        _, ours = pipelines
        default = self.request_for(folder)
        assert (default.height, default.width, default.condition_tokens) == (1024, 1024, 256)
        request = self.request_for(folder, height=128, width=192, num_inference_steps=2)
        assert (request.image_tokens, request.condition_tokens) == (6, 256)
        latents = contract.generate(ours, request)
        assert latents.shape == (1, 6, 64)
        assert ours.decode(latents, request).shape == (1, 128, 192, 3)

    def test_one_image_is_needed(self, folder):
        with pytest.raises(InvalidRequestError, match="1 image for this model"):
            contract.make_request(folder, "a hat")

    @pytest.mark.parametrize("size", [(1, 300), (300, 1), (2, 1999)])
    def test_an_image_too_long_for_the_text_encoder_is_refused(self, folder, size):
        with pytest.raises(
            InvalidRequestError, match=f'image="{size[0]}x{size[1]}" .* as long on one side as on the other'
        ):
            contract.make_request(folder, "a hat", [Image.new("RGB", size)])

    def test_a_long_image_that_it_takes(self, folder):
        assert contract.make_request(folder, "a hat", [Image.new("RGB", (1, 150))], height=64, width=64)


@pytest.mark.parametrize("hash_seed", range(4))
def test_contractions_are_whole_in_every_process(hash_seed):
    script = (
        "from vllm_cfg_plugin.pipelines.longcat_image.pipeline import _text_pieces\n"
        """print(_text_pieces("I don't, you can't, we won't say 'no' to Bob's dog"))"""
    )
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    expected = ["I don't, you can't, we won't say ", "'", "n", "o", "'", " to Bob's dog"]
    assert done.stdout == f"{expected}\n"
