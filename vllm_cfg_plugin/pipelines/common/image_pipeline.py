"""What the image pipelines of the engine have in common, on diffusers' own methods; must not import vLLM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import to_uint8
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.family import FamilyPipeline
from vllm_cfg_plugin.pipelines.common.flow_schedule import set_flow_timesteps
from vllm_cfg_plugin.pipelines.common.generate import Generators, make_requests

Asked = tuple[list[list[str]], dict[str, Any]]  # texts of each prompt's branches, fields of `DiffusionRequest`


class ImagePipeline(FamilyPipeline):
    """First latents, timesteps and pixels of requests and of direct calls; goes before diffusers' pipeline class."""

    vae: Any
    vae_scale_factor: int
    default_sample_size: int
    image_processor: Any
    prepare_latents: Any

    # ---- the engine's contract ----

    def draw_noise(self, request: DiffusionRequest, generator: torch.Generator) -> torch.Tensor:
        return self._first_latents(request, 1, generator)

    def make_noise_scheduler(self, request: DiffusionRequest) -> Any:
        # Its numbers stay on the CPU: reading one from a GPU would wait for all that is queued there.
        scheduler = deepcopy(self.scheduler)  # to make one anew takes some of them long
        tokens = request.image_tokens // (request.layers + 1)
        self.set_timesteps(scheduler, request.num_inference_steps, tokens, torch.device("cpu"))
        return scheduler

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, request: DiffusionRequest, condition: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        images = self._decode_latents(latents, request)
        return to_uint8(self.image_processor.postprocess(images, output_type="pt"))

    # ---- what a family may do in its own way ----

    @property
    @abstractmethod
    def _latent_channels(self) -> int:
        """Channels of latents as `prepare_latents` counts them."""

    def _noise_options(self, request: DiffusionRequest) -> dict[str, Any]:
        """Further arguments of `prepare_latents`."""
        return {}

    def _first_latents(
        self, request: DiffusionRequest, count: int, generator: Generators, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        like = self.prediction_like
        made = self.prepare_latents(
            batch_size=count,
            num_channels_latents=self._latent_channels,
            height=request.height,
            width=request.width,
            dtype=like.dtype,
            device=like.device,
            generator=generator,
            latents=latents,
            **self._noise_options(request),
        )
        noise: torch.Tensor = made[0] if isinstance(made, tuple) else made
        return noise

    @staticmethod
    def set_timesteps(scheduler: Any, num_inference_steps: int, image_tokens: int, device: torch.device) -> None:
        """Set a noise scheduler to the first of its steps, for an image (one layer of it) of so many tokens."""
        set_flow_timesteps(scheduler, num_inference_steps, image_tokens, device)

    @abstractmethod
    def _decode_latents(self, latents: torch.Tensor, request: DiffusionRequest) -> torch.Tensor:
        """[images, channels, height, width] in -1..1 of final latents."""

    @abstractmethod
    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in tokens of an image of that size in pixels."""

    # ---- direct calls ----

    @abstractmethod
    def _asked(self, call: CallArguments) -> Asked:
        """What a call asks for, but for the number of steps and results."""

    def _requests(self, call: CallArguments) -> list[DiffusionRequest]:
        if call.prompt is None:
            raise InvalidRequestError("prompt", None, "a text, or a list of texts")
        texts, fields = self._asked(call)
        rows, columns = self._grid(fields["height"], fields["width"])
        tokens = rows * columns * (fields.get("layers", 0) + 1)
        steps, results = call.num_inference_steps, call.num_images_per_prompt
        return make_requests(texts, results, num_inference_steps=steps, image_tokens=tokens, **fields)

    def _size(self, call: CallArguments) -> tuple[int, int]:
        """(height, width) in pixels, diffusers' own where a call does not give them."""
        side = self.default_sample_size * self.vae_scale_factor
        return call.height or side, call.width or side

    def _results(
        self, latents: torch.Tensor, request: DiffusionRequest, condition: Sequence[torch.Tensor], output_type: str
    ) -> Any:
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self._decode_latents(latents, request), output_type=output_type)
