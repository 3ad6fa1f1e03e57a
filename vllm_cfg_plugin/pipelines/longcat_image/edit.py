"""LongCat-Image editing, on diffusers' own methods.

Of the checkpoint's `text_processor` the engine loads the image processor alone. Must not import vLLM at module level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import (
    LongCatImageEditPipeline as DiffusersLongCatImageEditPipeline,
)
from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import calculate_dimensions
from PIL import Image
from transformers import Qwen2VLProcessor

from vllm_cfg_plugin.checkpoint import Checkpoint, ImageSize, PipelineInfo
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionRequest, Guidance
from vllm_cfg_plugin.pipelines.base import BranchInput, PromptEmbeds, from_pil, to_pil
from vllm_cfg_plugin.pipelines.common import vision_processor
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.autoencoders import vae_scale_factor
from vllm_cfg_plugin.pipelines.common.image_pipeline import Asked
from vllm_cfg_plugin.pipelines.longcat_image.pipeline import (
    CONDITION,
    LATENT_CHANNELS,
    NEW_IMAGE,
    LongCatImageBase,
    describe_longcat_image,
    guided_texts,
    image_ids,
)

_MAX_ASPECT_RATIO = 200  # what the image processor of the text encoder takes
EDIT_PIXELS = 1024 * 1024  # area that diffusers' `__call__` brings an image to


class LongCatImageEditPipeline(LongCatImageBase, DiffusersLongCatImageEditPipeline):
    """diffusers' LongCatImageEditPipeline with CFG-Parallel, for the engine or to be called directly.

    The result has the size that diffusers calculates from the image, unless a request to the engine asks for another.
    """

    call_options: ClassVar[dict[str, Any]] = {"cfg_normalize": False}

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        side = 2 * vae_scale_factor(checkpoint)
        processor = load_image_processor(checkpoint.model, checkpoint.revision).image_processor

        def condition_tokens(sizes: Sequence[ImageSize]) -> tuple[int, int]:
            height, width = _edit_size(sizes)
            return (height // side) * (width // side), _vision_tokens(processor, height, width)

        return describe_longcat_image(
            checkpoint,
            cfg_normalize=False,
            sees_images=True,
            min_images=1,
            max_images=1,
            condition_tokens=condition_tokens,
            default_size=_edit_size,
        )

    @classmethod
    def load(
        cls, model: str, *, dtype: torch.dtype, device: torch.device, revision: str | None = None, **components: Any
    ) -> Self:
        components = {"text_processor": load_image_processor(model, revision)} | components
        return super().load(model, dtype=dtype, device=device, revision=revision, **components)

    def _asked(self, call: CallArguments) -> Asked:
        height, width = _edit_size([call.image.size])
        self.check_inputs(call.prompt, height, width, call.negative_prompt)
        return guided_texts(call, call.prompt), {
            "height": height,
            "width": width,
            "guidance": Guidance(scale=call.guidance_scale, normalize=call.cfg_normalize),
            "images": [from_pil(call.image)],
            "text_sees_images": True,
        }

    @torch.no_grad()
    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        return PromptEmbeds(self._encode(request.prompts[branch], to_pil(request.images[0]))[0])

    @torch.no_grad()
    def encode_images(self, request: DiffusionRequest) -> list[torch.Tensor]:
        return [self._encode_condition(to_pil(request.images[0]))]

    def _encode(self, prompt: str, image: Image.Image) -> torch.Tensor:
        """Embeddings of a text that sees the image, [1, text tokens, dim]."""
        height, width = _edit_size([image.size])
        seen = self.image_processor.resize(self._resized(image), height // 2, width // 2)
        return self.encode_prompt([prompt], seen)[0]

    def _encode_condition(self, image: Image.Image) -> torch.Tensor:
        """Latents of the image to be edited, [1, condition tokens, channels]."""
        height, width = _edit_size([image.size])
        pixels = self.image_processor.preprocess(self._resized(image), height, width)
        latents = self._encode_vae_image(pixels.to(self._weight.device, self._weight.dtype), None)  # type: ignore[arg-type]
        return self._pack_latents(latents, 1, LATENT_CHANNELS, *latents.shape[2:])

    def _resized(self, image: Image.Image) -> Image.Image:
        return self.image_processor.resize(image.convert("RGB"), *_edit_size([image.size]))

    def _image_ids(self, branch: BranchInput) -> torch.Tensor:
        request, text_tokens = branch.request, branch.embeds.tokens.shape[0]
        new = self._grid(request.height, request.width)
        old = self._grid(*_edit_size([(image.width, image.height) for image in request.images]))
        return self._kept_ids(
            (new, old, text_tokens),
            lambda: torch.cat([image_ids(NEW_IMAGE, text_tokens, *new), image_ids(CONDITION, text_tokens, *old)]),
        )

    def _noise_options(self, request: DiffusionRequest) -> dict[str, Any]:
        # Only the position ids depend on the text.
        return {"image": None, "prompt_embeds_length": 0}


class _ImageProcessorOnly(Qwen2VLProcessor):
    """The checkpoint's `text_processor` as far as editing reads it: the rest needs torchvision, for videos."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor


def load_image_processor(model: str, revision: str | None = None) -> _ImageProcessorOnly:
    """What turns a checkpoint's images into patches for its text encoder.

    Raises:
        ConfigurationError: there is none.
    """
    return _ImageProcessorOnly(vision_processor.load_image_processor(model, "text_processor", revision))


def _edit_size(sizes: Sequence[ImageSize]) -> ImageSize:
    """(height, width) that an image to be edited is brought to, from its (width, height)."""
    [(width, height)] = sizes
    new_width, new_height = calculate_dimensions(EDIT_PIXELS, width / height)
    if max(new_width, new_height) > _MAX_ASPECT_RATIO * min(new_width, new_height):
        allowed = f"at most about {_MAX_ASPECT_RATIO} times as long on one side as on the other"
        raise InvalidRequestError("image", f"{width}x{height}", allowed)
    return new_height, new_width


def _vision_tokens(processor: Any, height: int, width: int) -> int:
    """Tokens that an image of so many pixels, seen at half its size, adds to the text: its own, a start and an end."""
    return vision_processor.tokens_of_image(processor, height // 2, width // 2) + 2
