"""What every Qwen-Image pipeline with images must do: like diffusers' own, and bitwise independent of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests import contract
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.pipelines.qwen_image.conditioned import QwenImageConditioned

CPU = torch.device("cpu")
STEPS = 6
GUIDED = {"negative_prompt": "ugly, unclear", "true_cfg_scale": 3.0}


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth random image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def shrink(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
    """Bring images to a 64th of the areas that diffusers' modules ask for: in the reference and in ours, who ask it."""
    for module in modules:
        original = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, own=original: own(area // 64, ratio))


def load(ours: type[QwenImageConditioned], folder: str | Path) -> tuple[Any, QwenImageConditioned]:
    """(diffusers' pipeline, ours)"""
    reference = getattr(diffusers, ours.__name__).from_pretrained(folder, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return reference, ours.load(str(folder), dtype=torch.float32, device=CPU)


class ConditionedChecks:
    """The tests; a family's class says what is built and asked.

    Fixture of the family, of class scope: `folder`, a checkpoint.

    Attributes:
        ours: our class, which has the name of diffusers' own.
        cases: (images, parameters) of requests.
    """

    ours: ClassVar[type[QwenImageConditioned]]
    cases: tuple[tuple[list[Image.Image], dict[str, Any]], ...] = ()

    @pytest.fixture(scope="class")
    @classmethod
    def pipelines(cls, folder):
        return load(cls.ours, folder)

    def make_request(self, folder, number, **params):
        images, own = self.cases[number]
        return contract.make_request(
            folder, "a red apple" + " on a table" * number, images, num_inference_steps=STEPS, seed=42, **own | params
        )

    def call(self, pipeline, number, **params):
        """A direct call for one of the cases, with the numbers of `make_request`."""
        images, own = self.cases[number]
        return pipeline(
            image=images if len(images) > 1 else images[0],
            prompt="a red apple" + " on a table" * number,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(42),
            **self.direct(own) | params,
        )

    def direct(self, own):
        """A request's own parameters as a direct call takes them."""
        return own

    def reference_latents(self, reference, number, **params):
        """diffusers' final latents; not all of its pipelines can return them."""
        seen = []

        def keep(pipeline, step, timestep, tensors):
            seen.append(tensors["latents"])
            return tensors

        self.call(reference, number, callback_on_step_end=keep, output_type="pt", **params)
        assert len(seen) == STEPS
        return seen[-1]

    @pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["unguided", "guided"])
    def test_latents_like_diffusers(self, pipelines, folder, guidance):
        reference, ours = pipelines
        for number in range(len(self.cases)):
            expected = self.reference_latents(reference, number, **guidance)
            assert expected.std() > 0.5
            latents = contract.generate(ours, self.make_request(folder, number, **guidance))
            torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
            called = self.call(ours, number, output_type="latent", return_dict=False, **guidance)[0]
            assert torch.equal(called, latents)

    def test_guidance_and_the_image_change_the_result(self, pipelines, folder):
        _, ours = pipelines
        request = self.make_request(folder, 0, **GUIDED)
        latents = contract.generate(ours, request)
        assert (contract.generate(ours, self.make_request(folder, 0)) - latents).abs().max() > 1e-3
        images, own = self.cases[0]
        others = [picture(*image.size, 99, image.mode) for image in images]
        changed = contract.make_request(
            folder, "a red apple", others, num_inference_steps=STEPS, seed=42, **own | GUIDED
        )
        assert (contract.generate(ours, changed) - latents).abs().max() > 1e-3

    def test_bytes_like_diffusers(self, pipelines, folder):
        _, ours = pipelines
        for number in range(len(self.cases)):
            request = self.make_request(folder, number, **GUIDED)
            pixels = ours.decode(contract.generate(ours, request), request)
            assert (pixels.dtype, pixels.device) == (torch.uint8, CPU)
            (expected,), (called,) = (self.call(pipeline, number, **GUIDED).images for pipeline in pipelines)
            expected, called = (images if isinstance(images, list) else [images] for images in (expected, called))
            for image, own, theirs in zip(pixels, called, expected, strict=True):
                contract.assert_same_pixels(image, theirs)
                assert np.array_equal(own, image)

    def test_tokens_are_as_many_as_the_request_says(self, pipelines, folder):
        _, ours = pipelines
        for number in range(len(self.cases)):
            request = self.make_request(folder, number, **GUIDED)
            first = contract.branches_of(ours, request)[0]
            contract.assert_tokens_are_counted(ours, request)
            assert first.latents.shape[1:] == ours.prediction_shape(request)
            assert first.latents.shape[1] == request.image_tokens
            assert sum(latents.shape[1] for latents in first.condition) == request.condition_tokens
            packed = ours.pack_branches([first])["hidden_states"]
            assert packed.shape[1] == request.image_tokens + request.condition_tokens

    def test_bits_do_not_depend_on_the_batch(self, pipelines, folder):
        """Requests with different images, sizes, texts and timesteps in one forward."""
        _, ours = pipelines
        requests = [self.make_request(folder, number, **GUIDED) for number in range(len(self.cases))]
        contract.assert_packed_is_alone(ours, requests)
        contract.assert_packed_is_alone(ours, requests[::-1])

    def test_images_and_texts_are_encoded_alike_every_time(self, pipelines, folder):
        _, ours = pipelines
        request = self.make_request(folder, 0, **GUIDED)
        for _ in range(2):
            first, second = (contract.branches_of(ours, request)[1] for _ in range(2))
            assert torch.equal(first.embeds.tokens, second.embeds.tokens)
            assert all(torch.equal(*pair) for pair in zip(first.condition, second.condition, strict=True))

    def test_an_image_is_needed_and_not_too_many(self, pipelines, folder):
        _, ours = pipelines
        many = [picture(32, 32)] * (ours.max_images + 1)
        for images in ([], many):
            with pytest.raises(InvalidRequestError, match=r"^image="):
                contract.make_request(folder, "a cat", images)
            with pytest.raises(InvalidRequestError, match=r"^image="):
                ours(image=images, prompt="a cat")

    def test_an_image_too_long_for_any_area_is_refused(self, pipelines, folder):
        _, ours = pipelines
        long = picture(2020, 20)
        with pytest.raises(InvalidRequestError, match='image="2020x20"'):
            ours(image=long, prompt="a cat")

    def test_several_results_and_one_prompt_in_a_direct_call(self, pipelines):
        _, ours = pipelines
        own = self.direct(self.cases[0][1])
        images = ours(
            image=self.cases[0][0], prompt="a cat", num_inference_steps=2, num_images_per_prompt=2, **own
        ).images
        assert len(images) == 2
        with pytest.raises(InvalidRequestError, match="prompt="):
            ours(image=self.cases[0][0], prompt=["a cat", "a dog"])
