"""Qwen-Image-Layered, which takes an image apart into layers with an alpha channel; on diffusers' own methods.

The latents hold the whole image, then its layers. diffusers writes a caption itself where there is no prompt; here a
prompt must be given. Must not import vLLM at module level.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered as upstream
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from PIL import Image

from vllm_cfg_plugin.checkpoint import Checkpoint, ImageSize, PipelineInfo
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import from_pil
from vllm_cfg_plugin.pipelines.common.flow_schedule import set_shifted_timesteps
from vllm_cfg_plugin.pipelines.common.generate import Generators
from vllm_cfg_plugin.pipelines.qwen_image.base import (
    MAX_TEXT_TOKENS,
    PROMPT_RULES,
    ImageShape,
    describe_qwen_image,
)
from vllm_cfg_plugin.pipelines.qwen_image.conditioned import QwenImageConditioned, in_whole_tokens, size_of_area

DEFAULT_LAYERS = 4
DEFAULT_RESOLUTION = 640
_BASE_TOKENS = 256 * 256 / 16 / 16  # of an image whose noise schedule is not shifted


class QwenImageLayeredPipeline(QwenImageConditioned, upstream.QwenImageLayeredPipeline):
    """diffusers' QwenImageLayeredPipeline with CFG-Parallel, for the engine or to be called directly."""

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        info: PipelineInfo = describe_qwen_image(
            checkpoint,
            PROMPT_RULES,
            {"layers": DEFAULT_LAYERS, "cfg_normalize": False},
            options=frozenset({"layers"}),
            min_images=1,
            max_images=1,
            condition_tokens=lambda sizes: (sum(info.image_tokens(height, width) for width, height in sizes), 0),
            images_take_result_size=True,
            default_size=lambda sizes: in_whole_tokens(cls.result_size(sizes[0]), info.size_multiple)[::-1],
        )
        return info

    @classmethod
    def result_size(cls, size: ImageSize, resolution: int = DEFAULT_RESOLUTION) -> ImageSize:
        """The (width, height) of image and layers for an image of this, unless the user says another."""
        return size_of_area(upstream.calculate_dimensions, resolution * resolution, size)

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image,
        prompt: str,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        layers: int = DEFAULT_LAYERS,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        resolution: int = DEFAULT_RESOLUTION,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        max_sequence_length: int = MAX_TEXT_TOKENS,
        cfg_normalize: bool = False,
    ) -> QwenImagePipelineOutput | tuple[Any]:
        """Take an image apart; under `torchrun` every rank calls this alike and returns the same layers.

        Args:
            image: what to take apart.
            negative_prompt: None switches guidance off; an empty string is a negative prompt.
            guidance_scale, true_cfg_scale: two names of the guidance scale, which is on above 1; `true_cfg_scale` wins.
            height, width: pixels; by default those of `resolution` squared, shaped like the image.
            generator, latents: source of the first latents, or these themselves.
            output_type: "pil", "np", "pt" or "latent".
            cfg_normalize: whether the guided prediction is brought back to the positive one's norm.

        Returns:
            A list of layers for each of `num_images_per_prompt`, or their latents.

        Raises:
            InvalidRequestError: several images or prompts, or too few steps for the noise schedule.
        """
        images = self._checked_images(image, prompt)
        default_width, default_height = self.result_size(images[0].size, resolution)
        asked = width or default_width, height or default_height
        width, height = in_whole_tokens(asked, 2 * self.vae_scale_factor)
        self.check_inputs(height, width, negative_prompt, max_sequence_length=max_sequence_length)
        results = self._generate_guided(
            prompt,
            negative_prompt,
            guidance_scale,
            true_cfg_scale,
            cfg_normalize,
            num_images_per_prompt,
            generator,
            latents,
            output_type,
            height=height,
            width=width,
            layers=layers,
            num_inference_steps=num_inference_steps,
            max_sequence_length=max_sequence_length,
            images=[from_pil(image) for image in images],
        )
        if output_type != "latent":
            results = [results[first : first + layers] for first in range(0, len(results), layers)]
        return QwenImagePipelineOutput(images=results) if return_dict else (results,)

    def _condition_sizes(self, request: DiffusionRequest) -> list[ImageSize]:
        return [(request.width, request.height)]

    def _image_shapes(self, height: int, width: int, layers: int) -> list[ImageShape]:
        return [self._image_shape(height, width)] * (layers + 1)

    def _noise_options(self, layers: int) -> dict[str, Any]:
        return {"image": None, "layers": layers}

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, image_tokens: int, device: torch.device) -> None:
        sigmas = np.linspace(1.0, 0, num_inference_steps + 1)[:-1]
        set_shifted_timesteps(scheduler, sigmas, (image_tokens / _BASE_TOKENS) ** 0.5, device)

    def _frames(self, latents: torch.Tensor, height: int, width: int, layers: int) -> torch.Tensor:
        frames = self._unpack_latents(latents, height, width, layers, self.vae_scale_factor)
        return frames[:, :, 1:].transpose(1, 2).flatten(0, 1)[:, :, None]  # the first is the whole image
