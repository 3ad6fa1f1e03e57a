"""A pipeline with three branches: prompt and image, image alone, neither; Qwen-Image's weights, no trained model.

Its guidance is that of InstructPix2Pix (Brooks et al. 2023, https://arxiv.org/abs/2211.09800) and OmniGen2 (Wu et al.
2025, https://arxiv.org/abs/2506.18871): `nothing + image_scale * (image - nothing) + scale * (both - image)`. The image
scale is the request's `guidance_scale_2`; 1, or none, needs no third branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from msgspec import structs

from vllm_cfg_plugin.checkpoint import Checkpoint, ImageSize, PipelineInfo
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import BranchInput
from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline


class ThreeBranchPipeline(QwenImagePipeline):
    """An image that comes along is more tokens after the latents' own, for the branches that see it."""

    guidance_fields = frozenset({"cfg_normalize"})

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        info = super().describe(checkpoint)

        def condition_tokens(sizes: Sequence[ImageSize]) -> tuple[int, int]:
            side = info.pixels_per_token
            return sum((width // side) * (height // side) for width, height in sizes), 0

        return replace(
            info,
            options=frozenset({"guidance_scale_2"}),
            max_images=2,
            condition_tokens=condition_tokens,
            with_more_branches=_with_third_branch,
        )

    @torch.no_grad()
    def encode_images(self, request: DiffusionRequest) -> list[torch.Tensor]:
        """[1, tokens, channels] of each image, cut to whole tokens."""
        encoded = []
        for image in request.images:
            pixels = torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8).view(image.height, image.width, -1)
            _, rows, columns = self._image_shape(image.height, image.width)
            side = 2 * self.vae_scale_factor
            pixels = pixels[: rows * side, : columns * side].permute(2, 0, 1)[None, :, None]
            latents = self.vae.encode(pixels.to(self._weight) / 127.5 - 1).latent_dist.mode()
            encoded.append(self._pack_latents(latents[:, :, 0], 1, latents.shape[1], 2 * rows, 2 * columns))
        return encoded

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        branches = [_as_it_sees(branch) for branch in branches]
        arguments = super().pack_branches(branches)
        for shapes, branch in zip(arguments["img_shapes"], branches, strict=True):
            if branch.condition:
                shapes += [self._image_shape(image.height, image.width) for image in branch.request.images]
        return arguments

    def unpack_predictions(self, prediction: torch.Tensor, branches: Sequence[BranchInput]) -> list[torch.Tensor]:
        return super().unpack_predictions(prediction, [_as_it_sees(branch) for branch in branches])

    def combine_branches(
        self, predictions: Sequence[torch.Tensor], request: DiffusionRequest, timestep: torch.Tensor, step: int
    ) -> torch.Tensor:
        if len(predictions) < 3:
            return super().combine_branches(predictions, request, timestep, step)
        both, image, nothing = predictions
        asked = request.guidance
        combined = nothing + asked.scale_2 * (image - nothing) + asked.scale * (both - image)
        return self.cfg_normalize_function(both, combined) if asked.normalize else combined


def _with_third_branch(request: DiffusionRequest) -> DiffusionRequest:
    """The negative branch once more, where there is an image to be guided by."""
    if not request.images or request.guidance.scale_2 in (None, 1):
        return request
    (_, text), (_, tokens) = request.prompts, request.text_tokens
    return structs.replace(request, prompts=[*request.prompts, text], text_tokens=[*request.text_tokens, tokens])


def _as_it_sees(branch: BranchInput) -> BranchInput:
    """The third branch sees no images."""
    return replace(branch, condition=()) if branch.branch == 2 else branch
