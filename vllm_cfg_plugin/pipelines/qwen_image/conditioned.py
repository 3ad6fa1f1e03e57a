"""What the Qwen-Image pipelines that take images share: their latents follow the noisy ones in each sequence.

Must not import vLLM at module level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline as DiffusersQwenImagePipeline
from PIL import Image

from vllm_cfg_plugin.checkpoint import ImageSize
from vllm_cfg_plugin.compat.libraries import let_vl_processors_do_without_videos
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import to_pil
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.qwen_image.base import ImageShape, QwenImageBase

# Beyond it a side of an image that is brought to diffusers' areas would come to nothing, and the image processor of the
# text encoder refuses twice as much.
_MAX_ASPECT_RATIO = 100


class QwenImageConditioned(QwenImageBase):
    """Encodes a request's images and gives each its place in the sequence; inherited beside diffusers' pipeline.

    Attributes:
        max_images: that a request may bring along; it must bring one.
    """

    max_images: ClassVar[int] = 1

    _encode_vae_image: Any

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As diffusers' `from_pretrained`."""
        let_vl_processors_do_without_videos()
        diffusers_class: Any = super()
        return diffusers_class.from_pretrained(*args, **kwargs)

    @torch.no_grad()
    def encode_images(self, request: DiffusionRequest) -> list[torch.Tensor]:
        sizes = self._condition_sizes(request)
        return [self._encode_image(to_pil(image), *size) for image, size in zip(request.images, sizes, strict=True)]

    def _condition_sizes(self, request: DiffusionRequest) -> list[ImageSize]:
        """The (width, height) that each of a request's images is brought to."""
        raise NotImplementedError

    def _condition_shapes(self, request: DiffusionRequest) -> list[ImageShape]:
        return [self._image_shape(height, width) for width, height in self._condition_sizes(request)]

    def _encode_image(self, image: Image.Image, width: int, height: int) -> torch.Tensor:
        pixels = self.image_processor.preprocess(self._in_mode_of_vae(image), height, width)[:, :, None]
        latents = self._encode_vae_image(pixels.to(self._weight.device, self.vae.dtype), generator=None)
        packed: torch.Tensor = DiffusersQwenImagePipeline._pack_latents(latents, *latents.shape[:2], *latents.shape[3:])
        return packed

    def _in_mode_of_vae(self, image: Image.Image) -> Image.Image:
        """RGBA where the model has layers; else RGB without the alpha channel, as diffusers' `load_image` leaves it."""
        return image.convert("RGBA" if self.vae.config.input_channels == 4 else "RGB")

    def _checked_images(self, call: CallArguments) -> list[Image.Image]:
        """The images of a direct call.

        Raises:
            InvalidRequestError: several prompts, no image or too many.
        """
        if not isinstance(call.prompt, str):
            raise InvalidRequestError("prompt", call.prompt, "one string: images go with one prompt")
        images = [call.image] if isinstance(call.image, Image.Image) else list(call.image or [])
        if not 1 <= len(images) <= self.max_images:
            raise InvalidRequestError("image", f"{len(images)} images", f"1 to {self.max_images} images")
        return images

    def _result_size(self, call: CallArguments, default: ImageSize) -> ImageSize:
        """The (width, height) that a direct call asks for, in whole tokens."""
        return in_whole_tokens((call.width or default[0], call.height or default[1]), 2 * self.vae_scale_factor)


def size_of_area(calculate_dimensions: Callable[[int, float], Any], area: int, size: ImageSize) -> ImageSize:
    """The (width, height) of an area in pixels that is shaped like an image of this (width, height).

    Args:
        calculate_dimensions: diffusers' function of the family.

    Raises:
        InvalidRequestError: an image so long that a side would vanish.
    """
    width, height = size
    if max(size) > _MAX_ASPECT_RATIO * min(size):
        allowed = f"at most {_MAX_ASPECT_RATIO} times as long on one side as on the other"
        raise InvalidRequestError("image", f"{width}x{height}", allowed)
    width, height, *_ = calculate_dimensions(area, width / height)
    return width, height


def in_whole_tokens(size: ImageSize, side: int) -> ImageSize:
    """A size cut to multiples of a token's side, as diffusers cuts it."""
    return size[0] // side * side, size[1] // side * side
