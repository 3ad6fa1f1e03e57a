"""What Wan's text-to-video and image-to-video share.

Wan 2.1 has one transformer; 2.2's 14B two experts, one for steps with much noise and one for the others; 2.2's 5B
another VAE and a timestep for every token. All on diffusers' own methods. Must not import vLLM at module level.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils.torch_utils import randn_tensor

from vllm_cfg_plugin.checkpoint import MODEL_INDEX, Checkpoint, PipelineInfo, TextRules
from vllm_cfg_plugin.compat.libraries import let_unipc_run_ahead, unipc_runs_ahead
from vllm_cfg_plugin.distributed.cfg_parallel import log_once
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, Guidance, ImageInput
from vllm_cfg_plugin.pipelines.base import BranchInput, PromptEmbeds, to_uint8
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.autoencoders import decode_standardised
from vllm_cfg_plugin.pipelines.common.family import FamilyPipeline
from vllm_cfg_plugin.pipelines.common.generate import DirectCall, Generators, branch_texts, make_requests
from vllm_cfg_plugin.pipelines.wan.transformer import PackedWanTransformer
from vllm_cfg_plugin.pipelines.wan.vae import ThreadSafeWanVAE

TEXT_TOKENS = 512  # every text is padded to so many, and the padding is attended to


class WanBase(FamilyPipeline):
    """What the Wan pipelines share; inherited beside diffusers' pipeline.

    Attributes:
        transformer: predicts all steps, or those with much noise where `transformer_2` predicts the others.
    """

    channel_dim: ClassVar[int] = 1
    adopted: ClassVar[dict[str, Any]] = {
        "transformer": PackedWanTransformer,
        "transformer_2": PackedWanTransformer,
        "vae": ThreadSafeWanVAE,
    }
    layer_lists: ClassVar[dict[str, Any]] = {"blocks": ()}
    output_class = WanPipelineOutput
    float32_components: ClassVar[tuple[str, ...]] = ("vae",)  # as the checkpoints' own examples load it

    transformer_2: Any
    config: Any
    vae: Any
    video_processor: Any
    _get_t5_prompt_embeds: Any
    vae_scale_factor_temporal: int
    vae_scale_factor_spatial: int

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        index = checkpoint.read_json(MODEL_INDEX) or {}
        vae = checkpoint.component_config("vae")
        transformer = checkpoint.component_config("transformer")
        patch, positions = transformer.get("patch_size", (1, 2, 2)), transformer.get("rope_max_seq_len", 1024)
        has_experts = index.get("boundary_ratio") is not None
        if has_experts:
            checkpoint.component_config("transformer_2")
            if not isinstance(index["boundary_ratio"], (int, float)):
                raise ConfigurationError(f"{MODEL_INDEX}: boundary_ratio={index['boundary_ratio']!r} is not a number")
            if not index.get("transformer_2") or index["transformer_2"][0] is None:
                raise ConfigurationError(f"{MODEL_INDEX}: transformer_2 is missing, and boundary_ratio needs it")
        pixels_per_token = vae.get("scale_factor_spatial", 8) * patch[1]
        frames_per_latent = vae.get("scale_factor_temporal", 4)
        is_5b = bool(index.get("expand_timesteps"))
        return PipelineInfo(
            text=TextRules(TEXT_TOKENS, pads=True, pieces=lambda prompt: [prompt_clean(prompt)]),
            size_multiple=pixels_per_token,
            pixels_per_token=pixels_per_token,
            cfg_scale="guidance_scale",
            needs_negative_prompt=False,
            options=frozenset({"num_frames", "max_sequence_length", *(["guidance_scale_2"] if has_experts else [])}),
            produces="video",
            frames_per_latent=frames_per_latent,
            max_side=positions * pixels_per_token,
            max_frames=(positions - 1) * frames_per_latent + 1,
            fps=24 if is_5b else 16,
            default_params=DiffusionParams(
                height=480,
                width=832,
                num_frames=81,
                num_inference_steps=50,
                guidance_scale=5.0,
                max_sequence_length=TEXT_TOKENS,
            ),
        )

    @torch.no_grad()
    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        weight = self._weight
        embeds = self._get_t5_prompt_embeds(
            request.prompts[branch], 1, request.max_sequence_length or TEXT_TOKENS, weight.device
        )
        return PromptEmbeds(embeds[0].to(weight.dtype))

    def draw_noise(self, request: DiffusionRequest, generator: torch.Generator) -> torch.Tensor:
        return self._first_latents(request, 1, generator)

    def make_noise_scheduler(self, request: DiffusionRequest) -> Any:
        # Its timesteps stay on the CPU: reading one from a GPU would wait for all that is queued there.
        scheduler = deepcopy(self.scheduler)  # to make one anew takes some of them long
        self.set_timesteps(scheduler, request.num_inference_steps, request.image_tokens, torch.device("cpu"))
        let_unipc_run_ahead(scheduler, self._weight.device)
        return scheduler

    def step_latents(
        self,
        scheduler: Any,
        noise_pred: torch.Tensor,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        with unipc_runs_ahead(scheduler, latents.device):
            return super().step_latents(scheduler, noise_pred, timestep, latents, generator)

    def predict_noise(self, current_model: Any = None, **kwargs: Any) -> torch.Tensor:
        """One forward of a transformer.

        Args:
            current_model: `transformer` or `transformer_2`; None for the first.
            **kwargs: its arguments.
        """
        prediction: torch.Tensor = (self.transformer if current_model is None else current_model)(**kwargs)[0]
        return prediction

    def expert_at(self, timestep: torch.Tensor) -> str:
        """Which transformer predicts a timestep: "transformer", or "transformer_2" below the boundary."""
        boundary = self.config.boundary_ratio
        is_second = boundary is not None and timestep < boundary * self.scheduler.config.num_train_timesteps
        return "transformer_2" if is_second else "transformer"

    def scale_at(self, timestep: torch.Tensor, guidance_scale: float, guidance_scale_2: float | None) -> float:
        """The guidance scale of a timestep."""
        if guidance_scale_2 is not None and self.expert_at(timestep) == "transformer_2":
            return guidance_scale_2
        return guidance_scale

    def add_condition(
        self, latents: torch.Tensor, timestep: torch.Tensor, condition: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(what the transformer sees of the latents, the timestep or one per token, embeddings of an image)."""
        return latents, timestep, None

    def forward_group(self, branch: BranchInput) -> Hashable:
        return self.expert_at(branch.timestep)

    def guidance_scale_at(self, request: DiffusionRequest, timestep: torch.Tensor) -> float:
        return self.scale_at(timestep, request.guidance.scale, request.guidance.scale_2)

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        inputs = [self.add_condition(branch.latents, branch.timestep, branch.condition) for branch in branches]
        images = [image for _, _, image in inputs if image is not None]
        return {
            "current_model": getattr(self, self.expert_at(branches[0].timestep)),
            "hidden_states": [latents.to(self._weight.dtype) for latents, _, _ in inputs],
            "timestep": [timestep for _, timestep, _ in inputs],
            "encoder_hidden_states": [branch.embeds.tokens for branch in branches],
            "encoder_hidden_states_image": images or None,
            "return_dict": False,
        }

    def unpack_predictions(self, prediction: torch.Tensor, branches: Sequence[BranchInput]) -> list[torch.Tensor]:
        shapes = [(1, *self.prediction_shape(branch.request)) for branch in branches]
        parts = prediction.split([shape[2] * shape[3] * shape[4] for shape in shapes], dim=2)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def prediction_shape(self, request: DiffusionRequest) -> tuple[int, ...]:
        side = self.vae_scale_factor_spatial
        frames = (request.num_frames - 1) // self.vae_scale_factor_temporal + 1
        return self.vae.config.z_dim, frames, request.height // side, request.width // side

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, request: DiffusionRequest, condition: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        video = decode_standardised(self.vae, self.final_latents(latents, condition))[0]  # [3, frames, height, width]
        return to_uint8(self.video_processor.denormalize(video).transpose(0, 1))

    def _requests(self, call: CallArguments) -> list[DiffusionRequest]:
        self._check_experts()
        height, width, num_frames = self._fitting(call.height, call.width, call.num_frames)
        guided = call.guidance_scale > 1
        # Empty texts where a caller has embeddings instead.
        prompt = call.prompt or [""] * (1 if call.prompt_embeds is None else call.prompt_embeds.shape[0])
        return make_requests(
            branch_texts(prompt, (call.negative_prompt or "") if guided else None),
            call.num_videos_per_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=call.num_inference_steps,
            guidance=Guidance(scale=call.guidance_scale, scale_2=call.guidance_scale_2),
            max_sequence_length=call.max_sequence_length,
            images=self._call_images(call),
            image_tokens=0,  # nobody reads it
        )

    def _check_experts(self) -> None:
        boundary_ratio = self.config.boundary_ratio
        missing = [name for name in ("transformer", "transformer_2") if getattr(self, name) is None]
        if missing and (boundary_ratio is not None or "transformer" in missing):
            raise ConfigurationError(
                f"model_index.json: {missing[0]} is missing with boundary_ratio={boundary_ratio}: it must be there"
            )

    def _call_images(self, call: CallArguments) -> list[ImageInput]:
        """Of a direct call."""
        return []

    def _encode_call_images(self, call: CallArguments, request: DiffusionRequest) -> list[torch.Tensor]:
        """What the images of a direct call are to the model."""
        return []

    def _direct_call(self, requests: Sequence[DiffusionRequest], call: CallArguments) -> DirectCall:
        embeds = [
            self._given_embeds(own, len(requests), call.num_videos_per_prompt)
            for own in (call.prompt_embeds, call.negative_prompt_embeds)
        ]
        options = {"attention_kwargs": call.attention_kwargs}
        condition = self._encode_call_images(call, requests[0])
        call.check_all_were_read()
        return DirectCall(self, requests, call.generator, embeds, condition, **options)

    def _first_latents(
        self, request: DiffusionRequest, count: int, generator: Generators, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        device = self._weight.device
        if latents is not None:
            return latents.to(device, torch.float32)
        shape = (count, *self.prediction_shape(request))
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _results(
        self, latents: torch.Tensor, request: DiffusionRequest, condition: Sequence[torch.Tensor], output_type: str
    ) -> Any:
        final = self.final_latents(latents, condition)
        if output_type == "latent":
            return final
        return self.video_processor.postprocess_video(decode_standardised(self.vae, final), output_type=output_type)

    def _given_embeds(
        self, embeds: torch.Tensor | None, requests: int, results_per_prompt: int
    ) -> list[PromptEmbeds] | None:
        """Those of a caller, [prompts, text_tokens, dim], for every request; one text's may serve all prompts."""
        if embeds is None:
            return None
        rows = embeds.to(self._weight.device, self._weight.dtype).expand(requests // results_per_prompt, -1, -1)
        return [PromptEmbeds(row) for row in rows for _ in range(results_per_prompt)]

    def _fitting(self, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
        """The nearest size that the model can make, rounded as diffusers' `__call__` does."""
        _, patch_height, patch_width = self.transformer.config.patch_size
        of_height, of_width = (self.vae_scale_factor_spatial * patch for patch in (patch_height, patch_width))
        per_latent = self.vae_scale_factor_temporal
        fitting = (
            height // of_height * of_height,
            width // of_width * of_width,
            num_frames if num_frames % per_latent == 1 else max(num_frames // per_latent * per_latent + 1, 1),
        )
        if fitting != (height, width, num_frames):
            log_once(
                f"height, width, num_frames = {(height, width, num_frames)} is rounded to {fitting}: the model needs "
                f"multiples of {of_height} and {of_width}, and a multiple of {per_latent} plus 1"
            )
        return fitting

    def final_latents(self, latents: torch.Tensor, condition: Sequence[torch.Tensor]) -> torch.Tensor:
        """What is decoded of the last step's latents."""
        return latents

    @property
    def _weight(self) -> torch.Tensor:
        # Others of the transformer's parameters are kept in float32.
        weight: torch.Tensor = self.transformer.patch_embedding.weight
        return weight
