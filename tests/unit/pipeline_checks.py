"""What every pipeline must do, whatever its family: like diffusers' own, and bitwise independent of the batch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tests import contract
from vllm_cfg_plugin.distributed import cfg_parallel
from vllm_cfg_plugin.pipelines.base import EnginePipeline

CPU = torch.device("cpu")
STEPS, SEED = 6, 42
PROMPTS = ["a red apple", "x", "a lighthouse in the rain"]


class PipelineChecks:
    """The tests. A family's class has a class-scoped fixture `folder` and, for `pipelines`, the attributes below.

    Attributes:
        ours, reference: our class and diffusers' own.
        scale: the name of the guidance scale.
        call_options: what diffusers' call needs beyond what ours does, to do the same.
        sizes: heights and widths that requests may ask for; none where the size follows from an image.
        guided_without_negative: a missing negative prompt is an empty one.
    """

    ours: ClassVar[type[EnginePipeline]]
    reference: ClassVar[Any]
    scale: ClassVar[str] = "guidance_scale"
    call_options: ClassVar[dict[str, Any]] = {}
    sizes: ClassVar[list[tuple[int, int]]] = [(64, 48), (32, 96), (16, 16), (64, 64)]
    guided_without_negative: ClassVar[bool] = True

    @classmethod
    def load_options(cls, folder: Path) -> dict[str, Any]:
        """Components that diffusers can't load by itself here."""
        return {}

    @classmethod
    def images(cls, number: int) -> list[Any]:
        """The images of a request; `number` tells apart the requests of a test."""
        return []

    @pytest.fixture(scope="class")
    @classmethod
    def pipelines(cls, folder):
        """(diffusers' pipeline, ours)"""
        reference = cls.reference.from_pretrained(folder, dtype=torch.float32, **cls.load_options(folder))
        reference.set_progress_bar_config(disable=True)
        return reference, cls.ours.load(str(folder), dtype=torch.float32, device=CPU)

    @pytest.fixture(autouse=True)
    def _forget_what_was_logged(self):
        cfg_parallel.log_once.cache_clear()

    def request_for(self, folder, number=0, **params):
        """A request, one of several that differ in everything."""
        size = dict(zip(("height", "width"), self.sizes[number % len(self.sizes)], strict=True)) if self.sizes else {}
        params = {"num_inference_steps": STEPS, "seed": SEED + number} | size | params
        return contract.make_request(folder, PROMPTS[number % 3], self.images(number), **params)

    def call(self, pipeline, request, output_type="latent", **options):
        """What a direct call makes of the same request."""
        arguments = {"prompt": request.prompts[0], "num_inference_steps": request.num_inference_steps} | options
        if request.guided:
            arguments |= {"negative_prompt": request.prompts[1], self.scale: request.guidance.scale}
        else:
            arguments |= {self.scale: 1.0}
        if self.sizes:
            arguments |= {"height": request.height, "width": request.width}
        if request.images:
            arguments |= {"image": self.images(request.seed - SEED)[0]}
        if not isinstance(pipeline, EnginePipeline):
            arguments |= self.call_options
        generator = torch.Generator().manual_seed(request.seed)
        return pipeline(**arguments, generator=generator, output_type=output_type, return_dict=False)[0]

    def guidance(self, negative_prompt="", scale=3.0):
        return {"negative_prompt": negative_prompt, self.scale: scale}

    @pytest.mark.parametrize("guidance", [("ugly, unclear", 3.0), (None, 1.0)])
    def test_latents_like_diffusers(self, pipelines, folder, guidance):
        reference, ours = pipelines
        request = self.request_for(folder, **self.guidance(*guidance))
        assert request.guided == (guidance[1] > 1)
        latents, expected = contract.generate(ours, request), self.call(reference, request)
        assert expected.std() > 0.5
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
        assert ours.prediction_shape(request) == tuple(latents.shape[1:])
        assert torch.equal(latents, self.call(ours, request))

    def test_pixels_like_diffusers(self, pipelines, folder):
        reference, ours = pipelines
        request = self.request_for(folder, num_inference_steps=2, **self.guidance())
        pixels = ours.decode(contract.generate(ours, request), request)
        assert (pixels.dtype, pixels.shape, pixels.device) == (torch.uint8, (1, request.height, request.width, 3), CPU)
        contract.assert_same_pixels(pixels[0], self.call(reference, request, "pil")[0])
        assert np.array_equal(pixels[0].numpy(), np.asarray(self.call(ours, request, "pil")[0]))

    def test_a_missing_negative_prompt(self, pipelines, folder):
        """It is an empty one or no guidance, as in diffusers."""
        _, ours = pipelines
        request = self.request_for(folder, num_inference_steps=2, **{self.scale: 3.0})
        assert request.guided == self.guided_without_negative
        called = self.call(ours, request, **{self.scale: 3.0}) if not request.guided else self.call(ours, request)
        assert torch.equal(contract.generate(ours, request), called)

    def test_guidance_that_is_off_is_explained(self, pipelines, folder, caplog):
        _, ours = pipelines
        request = self.request_for(folder, num_inference_steps=2, **{self.scale: 1.0})
        with caplog.at_level(logging.WARNING, logger="vllm_cfg_plugin"):
            self.call(ours, request)
            assert "guidance is off" not in caplog.text
            self.call(ours, request, negative_prompt="ugly")
            assert "guidance is off: a negative prompt was given" in caplog.text

    def test_bits_do_not_depend_on_the_batch(self, pipelines, folder):
        """Branches of requests that differ in size, text, image, timestep and guidance."""
        _, ours = pipelines
        contract.assert_packed_is_alone(
            ours, [self.request_for(folder, number, **self.guidance("ugly" * number)) for number in range(5)]
        )

    @torch.inference_mode()
    def test_token_counts_are_those_of_the_sequences(self, pipelines, folder):
        _, ours = pipelines
        for number in range(3):
            request = self.request_for(folder, number, **self.guidance("ugly, unclear"))
            contract.assert_tokens_are_counted(ours, request)
            branch = contract.branches_of(ours, request)[0]
            assert request.condition_tokens == sum(part.shape[1] for part in branch.condition)
            packed = ours.pack_branches([branch])
            assert packed["hidden_states"].shape[:2] == (1, request.image_tokens + request.condition_tokens)
            assert packed["encoder_hidden_states"].shape[:2] == (1, request.text_tokens[0])

    @torch.inference_mode()
    def test_text_is_encoded_alike_every_time(self, pipelines, folder):
        _, ours = pipelines
        requests = [self.request_for(folder, number) for number in range(3)]
        first, second = ([ours.encode_branch(request, 0) for request in requests] for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))

    def test_noise_schedulers_are_independent(self, pipelines, folder):
        _, ours = pipelines
        six, two = (self.request_for(folder, num_inference_steps=steps) for steps in (6, 2))
        first, second = ours.make_noise_scheduler(six), ours.make_noise_scheduler(two)
        assert (len(first.timesteps), len(second.timesteps)) == (6, 2)
        sample = torch.zeros(1, *ours.prediction_shape(six))
        first.step(sample, first.timesteps[0], sample)
        assert (first.step_index, second.step_index, second.begin_index) == (1, None, 0)
        assert first is not ours.scheduler

    def test_a_normalised_prediction_is_another(self, pipelines, folder):
        """`cfg_normalize` reaches the combination; what it does there is the mixin's."""
        _, ours = pipelines
        plain, normalised = (
            contract.generate(
                ours, self.request_for(folder, cfg_normalize=flag, num_inference_steps=2, **self.guidance("ugly", 5.0))
            )
            for flag in (False, True)
        )
        assert (plain - normalised).abs().max() > 1e-3


class ManyPromptsChecks(PipelineChecks):
    """For families whose direct call takes lists of prompts."""

    def test_several_prompts_and_images_like_diffusers(self, pipelines):
        reference, ours = pipelines
        arguments = {
            "prompt": ["a cat", "a dog in a hat"],
            "negative_prompt": ["", "blurry"],
            self.scale: 3.0,
            "num_images_per_prompt": 2,
            "num_inference_steps": 3,
            "height": 48,
            "width": 64,
            "output_type": "latent",
        }
        expected, latents = (
            pipeline(**arguments | options, generator=torch.Generator().manual_seed(1)).images
            for pipeline, options in ((reference, self.call_options), (ours, {}))
        )
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
        one_negative = ours(
            **arguments | {"negative_prompt": "blurry"}, generator=torch.Generator().manual_seed(1)
        ).images
        assert torch.equal(one_negative[2:], latents[2:])
        assert not torch.equal(one_negative[:2], latents[:2])
