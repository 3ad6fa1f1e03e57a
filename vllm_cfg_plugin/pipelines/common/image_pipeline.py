"""What the engine's image pipelines have in common, on diffusers' own methods; must not import vLLM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from vllm_cfg_plugin.distributed.cfg_parallel import same_on_all_ranks
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import EnginePipeline, to_uint8
from vllm_cfg_plugin.pipelines.common.flow_schedule import set_flow_timesteps
from vllm_cfg_plugin.pipelines.common.generate import DirectCall, Generators, make_requests


class ImagePipeline(EnginePipeline):
    """First latents, timesteps and pixels of requests and of direct calls; goes before diffusers' pipeline class.

    `layers` is the number of a layered image's, and 0 for all others.
    """

    vae: Any
    vae_scale_factor: int
    default_sample_size: int
    image_processor: Any
    prepare_latents: Any
    maybe_free_model_hooks: Any

    # ---- the engine's contract ----

    def draw_noise(self, request: DiffusionRequest, generator: torch.Generator) -> torch.Tensor:
        return self._prepare_noise(1, request.height, request.width, self._weight, generator, layers=request.layers)

    def make_noise_scheduler(self, request: DiffusionRequest) -> Any:
        # Its numbers stay on the CPU: reading one from a GPU would wait for all that is queued there.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        tokens = request.image_tokens // (request.layers + 1)
        self._set_timesteps(scheduler, request.num_inference_steps, tokens, torch.device("cpu"))
        return scheduler

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, request: DiffusionRequest, condition: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        images = self._decode_latents(latents, request.height, request.width, request.layers)
        return to_uint8(self.image_processor.postprocess(images, output_type="np"))

    # ---- what a family may do in its own way ----

    @property
    @abstractmethod
    def _latent_channels(self) -> int:
        """Channels of latents as `prepare_latents` counts them."""

    def _noise_options(self, layers: int) -> dict[str, Any]:
        """Further arguments of `prepare_latents`."""
        return {}

    def _prepare_noise(
        self,
        count: int,
        height: int,
        width: int,
        like: torch.Tensor,
        generator: Generators,
        latents: torch.Tensor | None = None,
        layers: int = 0,
    ) -> torch.Tensor:
        """First latents, [count, ...], of the dtype and on the device of `like`."""
        made = self.prepare_latents(
            batch_size=count,
            num_channels_latents=self._latent_channels,
            height=height,
            width=width,
            dtype=like.dtype,
            device=like.device,
            generator=generator,
            latents=latents,
            **self._noise_options(layers),
        )
        noise: torch.Tensor = made[0] if isinstance(made, tuple) else made
        return noise

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, image_tokens: int, device: torch.device) -> None:
        """Set a noise scheduler to the first of its steps, for an image (one layer of it) of so many tokens."""
        set_flow_timesteps(scheduler, num_inference_steps, image_tokens, device)

    @abstractmethod
    def _decode_latents(self, latents: torch.Tensor, height: int, width: int, layers: int = 0) -> torch.Tensor:
        """[images, channels, height, width] in -1..1 of final latents."""

    @abstractmethod
    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image in tokens."""

    # ---- direct calls ----

    def _generate(
        self,
        texts: Sequence[list[str]],
        results_per_prompt: int,
        generator: Generators,
        latents: torch.Tensor | None,
        output_type: str,
        *,
        height: int,
        width: int,
        layers: int = 0,
        **fields: Any,
    ) -> Any:
        """The body of a direct call: images of all texts; every rank returns the same.

        Args:
            texts: of each prompt, those of its branches.
            generator, latents: source of the first latents, or these themselves.
            output_type: "pil", "np", "pt", or "latent" for final latents.
            fields: further ones of `DiffusionRequest`.
        """
        rows, columns = self._grid(height, width)
        size = {"height": height, "width": width, "layers": layers, "image_tokens": rows * columns * (layers + 1)}
        requests = make_requests(texts, results_per_prompt, **size, **fields)
        noise = self._prepare_noise(len(requests), height, width, self._weight, generator, latents, layers)
        final = DirectCall(self, requests, generator).denoise(same_on_all_ranks(noise))
        images = self._finish(final, height, width, output_type, layers)
        self.maybe_free_model_hooks()
        return images

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels, diffusers' own where they are not given."""
        side = self.default_sample_size * self.vae_scale_factor
        return height or side, width or side

    def _finish(self, latents: torch.Tensor, height: int, width: int, output_type: str, layers: int = 0) -> Any:
        """What a direct call returns of final latents."""
        if output_type == "latent":
            return latents
        decoded = self._decode_latents(latents, height, width, layers)
        return self.image_processor.postprocess(decoded, output_type=output_type)
