"""Qwen-Image-Layered, which takes an image apart into layers with an alpha channel; on diffusers' own methods.

The latents hold the whole image, then its layers. For an empty prompt the text encoder writes a caption as in
diffusers, but never samples its words. Must not import vLLM at module level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered as upstream

from vllm_cfg_plugin.checkpoint import Checkpoint, ImageSize, PipelineInfo
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import PromptEmbeds, from_pil, to_pil
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.flow_schedule import set_shifted_timesteps
from vllm_cfg_plugin.pipelines.common.image_pipeline import Asked
from vllm_cfg_plugin.pipelines.qwen_image.base import (
    PROMPT_RULES,
    ImageShape,
    describe_qwen_image,
)
from vllm_cfg_plugin.pipelines.qwen_image.conditioned import QwenImageConditioned, in_whole_tokens, size_of_area

DEFAULT_LAYERS = 4
DEFAULT_RESOLUTION = 640
CAPTIONED = ("", " ")  # prompts that diffusers answers by a caption
_BASE_TOKENS = 256 * 256 / 16 / 16  # of an image whose noise schedule is not shifted


class QwenImageLayeredPipeline(QwenImageConditioned, upstream.QwenImageLayeredPipeline):
    """diffusers' QwenImageLayeredPipeline with CFG-Parallel, for the engine or to be called directly."""

    # diffusers takes the size from the image alone.
    call_options: ClassVar[dict[str, Any]] = {
        **QwenImageConditioned.call_options,
        "cfg_normalize": False,
        "height": None,
        "width": None,
    }

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        info: PipelineInfo = describe_qwen_image(
            checkpoint,
            dataclasses.replace(PROMPT_RULES, captioned=CAPTIONED),
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

    def _asked(self, call: CallArguments) -> Asked:
        (image,) = self._checked_images(call)
        width, height = self._result_size(call, self.result_size(image.size, call.resolution))
        self.check_inputs(height, width, call.negative_prompt, max_sequence_length=call.max_sequence_length)
        texts, fields = self._guided(call)
        own = {"layers": call.layers, "images": [from_pil(image)], "is_captioned": call.prompt in CAPTIONED}
        return texts, fields | {"height": height, "width": width, **own}

    def _results(
        self, latents: torch.Tensor, request: DiffusionRequest, condition: Sequence[torch.Tensor], output_type: str
    ) -> Any:
        """The layers of each result, or the latents of all."""
        results, layers = super()._results(latents, request, condition, output_type), request.layers
        if output_type == "latent":
            return results
        return [results[first : first + layers] for first in range(0, len(results), layers)]

    @torch.no_grad()
    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        if request.is_captioned and branch == 0:
            request = msgspec.structs.replace(request, prompts=[self._caption(request), *request.prompts[1:]])
        return super().encode_branch(request, branch)

    def _caption(self, request: DiffusionRequest) -> str:
        image = self._in_mode_of_vae(to_pil(request.images[0]))
        # A sampled caption would not depend on the request alone.
        self.text_encoder.generation_config.do_sample = False
        seen = self.image_processor.resize(image, request.height, request.width)
        caption: str = self.get_image_caption(seen, use_en_prompt=False, device=self._weight.device)
        return caption

    def _condition_sizes(self, request: DiffusionRequest) -> list[ImageSize]:
        return [(request.width, request.height)]

    def _image_shapes(self, height: int, width: int, layers: int) -> list[ImageShape]:
        return [self._image_shape(height, width)] * (layers + 1)

    def _noise_options(self, request: DiffusionRequest) -> dict[str, Any]:
        return {"image": None, "layers": request.layers}

    @staticmethod
    def set_timesteps(scheduler: Any, num_inference_steps: int, image_tokens: int, device: torch.device) -> None:
        sigmas = np.linspace(1.0, 0, num_inference_steps + 1)[:-1]
        set_shifted_timesteps(scheduler, num_inference_steps, sigmas, (image_tokens / _BASE_TOKENS) ** 0.5, device)

    def _frames(self, latents: torch.Tensor, request: DiffusionRequest) -> torch.Tensor:
        size = request.height, request.width
        frames = self._unpack_latents(latents, *size, request.layers, self.vae_scale_factor)
        return frames[:, :, 1:].transpose(1, 2).flatten(0, 1)[:, :, None]  # the first is the whole image
