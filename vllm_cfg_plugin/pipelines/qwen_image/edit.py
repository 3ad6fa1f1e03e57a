"""Qwen-Image-Edit, one image to edit, and Qwen-Image-Edit-Plus, one or more to draw on; on diffusers' own methods.

Must not import vLLM at module level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as upstream_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as upstream_plus
from PIL import Image

from vllm_cfg_plugin.checkpoint import Checkpoint, ImageSize, PipelineInfo, TextRules
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import from_pil
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.image_pipeline import Asked
from vllm_cfg_plugin.pipelines.common.vision_processor import PLACEHOLDERS, load_image_processor, tokens_of_image
from vllm_cfg_plugin.pipelines.qwen_image.base import MAX_TEXT_TOKENS, describe_qwen_image
from vllm_cfg_plugin.pipelines.qwen_image.conditioned import QwenImageConditioned, in_whole_tokens, size_of_area

EDIT_TEMPLATE = (  # of diffusers' `__init__`, where only an object has it
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
RESULT_AREA = 1024 * 1024


class QwenImageEditBase(QwenImageConditioned):
    """What the editing pipelines share: the text encoder sees the images, and the result has about a million pixels.

    Attributes:
        image_argument: what diffusers' `prepare_latents` calls the images.
        image_template: what stands for an image in the text, by its number.
    """

    image_argument: ClassVar[str]
    image_template: ClassVar[str]

    @classmethod
    def result_size(cls, sizes: Sequence[ImageSize]) -> ImageSize:
        """The result's (width, height) for images of these, unless the user says another."""
        raise NotImplementedError

    @classmethod
    def condition_sizes(cls, sizes: Sequence[ImageSize]) -> list[ImageSize]:
        """What images of these (width, height) are brought to for the VAE."""
        raise NotImplementedError

    @classmethod
    def text_sizes(cls, sizes: Sequence[ImageSize]) -> list[ImageSize]:
        """What images of these (width, height) are brought to for the text encoder."""
        raise NotImplementedError

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        processor = load_image_processor(checkpoint.model, "processor", checkpoint.revision)

        def condition_tokens(sizes: Sequence[ImageSize]) -> tuple[int, int]:
            return (
                sum(info.image_tokens(height, width) for width, height in cls.condition_sizes(sizes)),
                # The template has one for each.
                sum(tokens_of_image(processor, height, width) - 1 for width, height in cls.text_sizes(sizes)),
            )

        info: PipelineInfo = describe_qwen_image(
            checkpoint,
            TextRules(
                MAX_TEXT_TOKENS,
                EDIT_TEMPLATE,
                prefix_tokens=64,
                sees_images=True,
                image_template=cls.image_template,
                reserved=PLACEHOLDERS,
            ),
            {"max_sequence_length": MAX_TEXT_TOKENS},  # diffusers cuts no text of an edit
            min_images=1,
            max_images=cls.max_images,
            condition_tokens=condition_tokens,
            default_size=lambda sizes: in_whole_tokens(cls.result_size(sizes), info.size_multiple)[::-1],
        )
        return info

    def _asked(self, call: CallArguments) -> Asked:
        images = self._checked_images(call)
        width, height = self._result_size(call, self.result_size([image.size for image in images]))
        most = call.max_sequence_length
        self.check_inputs(call.prompt, height, width, call.negative_prompt, max_sequence_length=most)
        texts, fields = self._guided(call)
        own = {"height": height, "width": width, "images": [from_pil(image) for image in images]}
        return texts, fields | own | {"text_sees_images": True}

    def _seen_by_text(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        sizes = self.text_sizes([image.size for image in images])
        return {
            "image": [
                self.image_processor.resize(self._in_mode_of_vae(image), height, width)
                for image, (width, height) in zip(images, sizes, strict=True)
            ]
        }

    def _condition_sizes(self, request: DiffusionRequest) -> list[ImageSize]:
        return self.condition_sizes([(image.width, image.height) for image in request.images])

    def _noise_options(self, request: DiffusionRequest) -> dict[str, Any]:
        return {self.image_argument: None}


class QwenImageEditPipeline(QwenImageEditBase, upstream_edit.QwenImageEditPipeline):
    """diffusers' QwenImageEditPipeline with CFG-Parallel, for the engine or to be called directly."""

    image_argument = "image"
    image_template = "<|vision_start|><|image_pad|><|vision_end|>"

    @classmethod
    def result_size(cls, sizes: Sequence[ImageSize]) -> ImageSize:
        return size_of_area(upstream_edit.calculate_dimensions, RESULT_AREA, sizes[0])

    @classmethod
    def condition_sizes(cls, sizes: Sequence[ImageSize]) -> list[ImageSize]:
        return [size_of_area(upstream_edit.calculate_dimensions, RESULT_AREA, size) for size in sizes]

    @classmethod
    def text_sizes(cls, sizes: Sequence[ImageSize]) -> list[ImageSize]:
        return cls.condition_sizes(sizes)


class QwenImageEditPlusPipeline(QwenImageEditBase, upstream_plus.QwenImageEditPlusPipeline):
    """diffusers' QwenImageEditPlusPipeline with CFG-Parallel, for the engine or to be called directly."""

    # The text's positions end at 4096: so many images of at most 230 tokens, and a prompt of 1024, fit.
    max_images = 10
    image_argument = "images"
    image_template = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"

    @classmethod
    def result_size(cls, sizes: Sequence[ImageSize]) -> ImageSize:
        return size_of_area(upstream_plus.calculate_dimensions, RESULT_AREA, sizes[-1])

    @classmethod
    def condition_sizes(cls, sizes: Sequence[ImageSize]) -> list[ImageSize]:
        return [size_of_area(upstream_plus.calculate_dimensions, upstream_plus.VAE_IMAGE_SIZE, size) for size in sizes]

    @classmethod
    def text_sizes(cls, sizes: Sequence[ImageSize]) -> list[ImageSize]:
        area = upstream_plus.CONDITION_IMAGE_SIZE
        return [size_of_area(upstream_plus.calculate_dimensions, area, size) for size in sizes]
