"""What all Qwen-Image pipelines share: the engine's contract and direct calls, on diffusers' own methods.

Must not import vLLM at module level.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, ClassVar

import torch
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from PIL import Image

from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo, TextRules
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, Guidance
from vllm_cfg_plugin.pipelines.base import BranchInput, PromptEmbeds, to_pil
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.autoencoders import decode_standardised
from vllm_cfg_plugin.pipelines.common.generate import branch_texts, is_guided
from vllm_cfg_plugin.pipelines.common.image_pipeline import Asked
from vllm_cfg_plugin.pipelines.common.latent_tokens import LatentTokensPipeline
from vllm_cfg_plugin.pipelines.qwen_image.cfg_parallel import QwenImageCFGParallelMixin
from vllm_cfg_plugin.pipelines.qwen_image.transformer import PackedQwenImageTransformer
from vllm_cfg_plugin.pipelines.qwen_image.vae import ImageQwenImageVAE

DEFAULT_CFG_SCALE = 4.0
DEFAULT_TEXT_TOKENS, MAX_TEXT_TOKENS = 512, 1024
# Of the model's 4096 positions, half of the longest side takes some and the text the next ones: at most 3324 with the
# ten images of an edit.
MAX_SIDE_TOKENS = 2 * (4096 - 3328)
PROMPT_TEMPLATE = (  # of diffusers' `__init__`, where only an object has it
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PROMPT_RULES = TextRules(MAX_TEXT_TOKENS, PROMPT_TEMPLATE, prefix_tokens=34)

ImageShape = tuple[int, int, int]  # (frames, height, width) of an image in tokens


class QwenImageBase(QwenImageCFGParallelMixin, LatentTokensPipeline):
    """The engine's contract for Qwen-Image's pipelines, and what they read of a direct call.

    Inherited beside diffusers' pipeline, whose methods it calls. `image_latents` are [1, tokens, channels] everywhere,
    one tensor for each image that is a condition.
    """

    adopted: ClassVar[dict[str, Any]] = {"transformer": PackedQwenImageTransformer, "vae": ImageQwenImageVAE}
    layer_lists: ClassVar[dict[str, Any]] = {"transformer_blocks": ("img_mod", "txt_mod")}
    output_class = QwenImagePipelineOutput
    # `true_cfg_scale` is the name of today, `guidance_scale` an older one of the same.
    call_options: ClassVar[dict[str, Any]] = {
        "true_cfg_scale": None,
        "cfg_normalize": True,
    }

    text_encoder: Any
    check_inputs: Any
    encode_prompt: Any

    # ---- the engine's contract ----

    @torch.no_grad()
    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        embeds, _ = self.encode_prompt(
            request.prompts[branch],
            device=self._weight.device,
            max_sequence_length=request.max_sequence_length or DEFAULT_TEXT_TOKENS,
            **self._seen_by_text([to_pil(image) for image in request.images]),
        )
        return PromptEmbeds(embeds[0])

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        return super().pack_branches(branches) | {
            "timesteps_ahead": self._times_ahead(branches),
            "img_shapes": [
                [
                    *self._image_shapes(branch.request.height, branch.request.width, branch.request.layers),
                    *self._condition_shapes(branch.request),
                ]
                for branch in branches
            ],
            "txt_seq_lens": [branch.embeds.tokens.shape[0] for branch in branches],
        }

    def forget_derived(self) -> None:
        self.transformer.modulations.clear()

    # ---- what a family may do in its own way ----

    def _seen_by_text(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Further arguments of `encode_prompt`, where the text encoder reads the images too."""
        return {}

    def _condition_shapes(self, request: DiffusionRequest) -> list[ImageShape]:
        """Of the images that `encode_images` made latents of."""
        return []

    def _image_shapes(self, height: int, width: int, layers: int) -> list[ImageShape]:
        """Of the latents of a result of that size in pixels."""
        return [self._image_shape(height, width)]

    def _frames(self, latents: torch.Tensor, request: DiffusionRequest) -> torch.Tensor:
        """What the VAE decodes of final latents, [images, channels, 1, latent height, latent width]."""
        return self._unpack_latents(latents, request.height, request.width, self.vae_scale_factor)

    # ---- what all do alike ----

    def _guided(self, call: CallArguments) -> Asked:
        """The texts of a call's branches, and the fields that all pipelines have."""
        older_name, asked = call.guidance_scale, call.true_cfg_scale
        asked = older_name if asked is None else asked
        scale = DEFAULT_CFG_SCALE if asked is None else asked
        # Who asks for nothing need not be told that guidance is off.
        is_asked = asked is not None or call.negative_prompt is not None
        guided = is_asked and is_guided(scale, call.negative_prompt)
        return branch_texts(call.prompt, call.negative_prompt if guided else None), {
            "guidance": Guidance(scale=scale, normalize=call.cfg_normalize),
            "max_sequence_length": call.max_sequence_length,
        }

    def _image_shape(self, height: int, width: int) -> ImageShape:
        """(frames, height, width) in tokens of an image of that size in pixels."""
        return 1, *self._grid(height, width)

    def _decode_latents(self, latents: torch.Tensor, request: DiffusionRequest) -> torch.Tensor:
        return decode_standardised(self.vae, self._frames(latents, request))[:, :, 0]


def describe_qwen_image(
    checkpoint: Checkpoint, text: TextRules, defaults: dict[str, Any], options: Set[str] = frozenset(), **details: Any
) -> PipelineInfo:
    """What a checkpoint of this kind can do.

    Args:
        defaults: parameters for which its diffusers pipeline has other defaults than Qwen-Image's own.
        options: those that its pipeline has beside Qwen-Image's own.
        details: further fields of `PipelineInfo`.

    Raises:
        ConfigurationError: a configuration file is missing.
    """
    vae = checkpoint.component_config("vae")
    # diffusers pipeline_qwenimage.py: two latent pixels each way make one token.
    vae_scale_factor = 2 ** len(vae["temperal_downsample"])
    side = 128 * vae_scale_factor
    shared = {
        "height": side,
        "width": side,
        "num_inference_steps": 50,
        "true_cfg_scale": DEFAULT_CFG_SCALE,
        "negative_prompt": None,
        "cfg_normalize": True,
        "max_sequence_length": DEFAULT_TEXT_TOKENS,
    }
    return PipelineInfo(
        text=text,
        size_multiple=2 * vae_scale_factor,
        pixels_per_token=2 * vae_scale_factor,
        max_side=MAX_SIDE_TOKENS * 2 * vae_scale_factor,
        cfg_scale="true_cfg_scale",
        default_params=DiffusionParams(**shared | defaults),
        options=frozenset({"max_sequence_length", *options}),
        **details,
    )
