"""Wan image-to-video: an image (for some models a last one too) that a video starts from; see `base.py` for more.

Three layouts: Wan 2.1 reads the image's latents beside the noise and its embeddings in cross attention, 2.2's 14B its
latents alone, and 2.2's 5B holds it as the first frame, at timestep 0. Must not import vLLM at module level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import sqrt
from typing import Any, ClassVar

import msgspec
import torch
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline as DiffusersWanImageToVideoPipeline
from msgspec import UNSET

from vllm_cfg_plugin.checkpoint import DEFAULTS_FILE, MODEL_INDEX, Checkpoint, ImageSize, PipelineInfo
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionRequest, ImageInput
from vllm_cfg_plugin.pipelines.base import to_pil
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.wan.base import WanBase

_HEIGHT, _WIDTH = 480, 832  # the area of a video of no given size
_ENCODED = ImageInput("encoded", "RGB", 0, 0, b"")  # stands for an image of a direct call, which may be a tensor


class WanImageToVideoPipeline(WanBase, DiffusersWanImageToVideoPipeline):
    """diffusers' WanImageToVideoPipeline with CFG-Parallel, for the engine or to be called directly."""

    float32_components: ClassVar[tuple[str, ...]] = ("vae", "image_encoder")

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        info = super().describe(checkpoint)
        transformer = checkpoint.component_config("transformer")
        is_5b = bool((checkpoint.read_json(MODEL_INDEX) or {}).get("expand_timesteps"))
        embedding_tokens, options, default_params = 0, info.options, info.default_params
        least, most = 1, 1 if is_5b else 2
        if transformer.get("image_dim") is not None:
            encoder = checkpoint.component_config("image_encoder")
            embedding_tokens = (encoder["image_size"] // encoder["patch_size"]) ** 2 + 1
            # diffusers' transformer takes the last 512 for the text's, whatever `max_sequence_length` was.
            options -= {"max_sequence_length"}
            default_params = msgspec.structs.replace(default_params, max_sequence_length=UNSET)
            least = most = 1 if transformer.get("pos_embed_seq_len") is None else 2
        default = checkpoint.read_json(DEFAULTS_FILE) or {}
        area = default.get("height", _HEIGHT) * default.get("width", _WIDTH)
        return dataclasses.replace(
            info,
            options=options,
            default_params=default_params,
            min_images=least,
            max_images=most,
            condition_tokens=lambda sizes: (0, embedding_tokens * len(sizes)),
            default_size=lambda sizes: _size_like(sizes[0], area, info.size_multiple, info.max_side),
        )

    def _requests(self, call: CallArguments) -> list[DiffusionRequest]:
        embeds = call.prompt_embeds, call.negative_prompt_embeds
        size, scale_2 = (call.height, call.width), call.guidance_scale_2
        self.check_inputs(call.prompt, call.negative_prompt, call.image, *size, *embeds, guidance_scale_2=scale_2)
        return super()._requests(call)

    def _call_images(self, call: CallArguments) -> list[ImageInput]:
        return [_ENCODED] * (1 if call.last_image is None else 2)

    def _encode_call_images(self, call: CallArguments, request: DiffusionRequest) -> list[torch.Tensor]:
        images = [call.image] if call.last_image is None else [call.image, call.last_image]
        return self._encode(images, request.height, request.width, request.num_frames)

    @property
    def decode_sees_images(self) -> bool:  # type: ignore[override]
        return bool(self.config.expand_timesteps)

    @torch.no_grad()
    def encode_images(self, request: DiffusionRequest) -> list[torch.Tensor]:
        images = [to_pil(image).convert("RGB") for image in request.images]
        return self._encode(images, request.height, request.width, request.num_frames)

    def add_condition(
        self, latents: torch.Tensor, timestep: torch.Tensor, condition: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """See `WanBase.add_condition`.

        Args:
            condition: the latents of the image: of one frame in the 5B layout, else with a mask of the known frames and
                of as many frames as the video; then the image's embeddings where the model reads them.
        """
        if self.config.expand_timesteps:
            _, patch_height, patch_width = self.transformer.config.patch_size
            frames, height, width = latents.shape[2:]
            of_frames = timestep.float().repeat(frames, height // patch_height * (width // patch_width))
            of_frames[0] = 0
            return self.final_latents(latents, condition), of_frames.flatten(), None
        image_embeds = condition[1] if len(condition) > 1 else None
        return torch.cat([latents, condition[0]], dim=1), timestep, image_embeds

    def final_latents(self, latents: torch.Tensor, condition: Sequence[torch.Tensor]) -> torch.Tensor:
        """With the image as first frame in the 5B layout, whatever the model predicted there."""
        if not self.config.expand_timesteps:
            return latents
        return torch.cat([condition[0].expand(latents.shape[0], -1, -1, -1, -1), latents[:, :, 1:]], dim=2)

    def _encode(self, images: Sequence[Any], height: int, width: int, num_frames: int) -> list[torch.Tensor]:
        """What the first image and perhaps a last one are to the model, see `add_condition`; PIL images or tensors."""
        if len(images) > 1 and num_frames < 2:
            raise InvalidRequestError("num_frames", num_frames, "more than 1 with a last image")
        weight = self._weight
        embeds = []
        if self.transformer.config.image_dim is not None:
            seen = images[0] if len(images) == 1 else list(images)
            embeds = [self.encode_image(seen, weight.device).to(weight.dtype)]
        first, last = [
            *(
                self.video_processor.preprocess(image, height=height, width=width).to(weight.device, torch.float32)
                for image in images
            ),
            None,
        ][:2]
        # Of its latents only the condition is read: the noise is drawn apart.
        _, condition, *_ = self.prepare_latents(
            first,
            1,
            self.vae.config.z_dim,
            height,
            width,
            num_frames,
            torch.float32,
            weight.device,
            latents=torch.empty(0),
            last_image=last,
        )
        return [condition, *embeds]


def _size_like(image: ImageSize, area: int, multiple: int, max_side: int) -> ImageSize:
    """(height, width) of about this area with an image's aspect ratio, as diffusers' examples choose it.

    Raises:
        InvalidRequestError: an image so long that a side would be above `max_side`.
    """
    width, height = image
    sides = round(sqrt(area * height / width)), round(sqrt(area * width / height))
    fitted_height, fitted_width = (max(side // multiple, 1) * multiple for side in sides)
    if max(fitted_height, fitted_width) > max_side:
        times = f"at most about {max_side**2 / area:.0f} times as long on one side as on the other"
        raise InvalidRequestError("image", f"{width}x{height}", f"{times}, or sent with a size of the video")
    return fitted_height, fitted_width
