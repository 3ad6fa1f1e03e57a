"""Qwen-Image text-to-image: the CFG-Parallel denoising loop and the engine's pipeline, on diffusers' own methods.

Must not import vLLM at module level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline as DiffusersQwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo, TextRules
from vllm_cfg_plugin.distributed.cfg_parallel import CFGParallelMixin, log_once, same_on_all_ranks
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline, PromptEmbeds, to_uint8
from vllm_cfg_plugin.pipelines.qwen_image_packed import PackedQwenImageTransformer
from vllm_cfg_plugin.pipelines.qwen_image_vae import ImageQwenImageVAE

DEFAULT_CFG_SCALE = 4.0
MAX_TEXT_TOKENS = 1024
PROMPT_TEMPLATE = (  # of diffusers' `__init__`, where only an object has it
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


class QwenImageCFGParallelMixin(CFGParallelMixin):
    """The denoising loop of the Qwen-Image pipelines, on one rank or many."""

    def diffuse(
        self,
        prompt_embeds: torch.Tensor,
        prompt_embeds_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds_mask: torch.Tensor | None,
        latents: torch.Tensor,
        img_shapes: Sequence[Any],
        txt_seq_lens: Sequence[int] | None,
        negative_txt_seq_lens: Sequence[int] | None,
        timesteps: torch.Tensor,
        do_true_cfg: bool,
        guidance: torch.Tensor | None,
        true_cfg_scale: float,
        cfg_normalize: bool = True,
    ) -> torch.Tensor:
        """Denoise a batch through all timesteps; every rank returns the same latents.

        Args:
            prompt_embeds, negative_prompt_embeds: [batch, text tokens, dim]; the negative ones only where
                `do_true_cfg`.
            prompt_embeds_mask, negative_prompt_embeds_mask: [batch, text tokens], ones then zeros; None for all ones.
            latents: [batch, image tokens, channels].
            img_shapes: (frames, height, width) in tokens of each batch element's images.
            txt_seq_lens, negative_txt_seq_lens: text tokens of each batch element.
            timesteps: the noise scheduler's.
        """
        for t in timesteps:
            timestep = t.expand(latents.shape[0]).to(device=latents.device, dtype=latents.dtype)
            shared = {
                "hidden_states": latents,
                "timestep": timestep / 1000,
                "guidance": guidance,
                "img_shapes": img_shapes,
            }
            positive_kwargs = shared | {
                "encoder_hidden_states": prompt_embeds,
                "encoder_hidden_states_mask": prompt_embeds_mask,
                "txt_seq_lens": txt_seq_lens,
            }
            negative_kwargs = shared | {
                "encoder_hidden_states": negative_prompt_embeds,
                "encoder_hidden_states_mask": negative_prompt_embeds_mask,
                "txt_seq_lens": negative_txt_seq_lens,
            }
            noise_pred = self.predict_noise_maybe_with_cfg(
                do_true_cfg=do_true_cfg,
                true_cfg_scale=true_cfg_scale,
                positive_kwargs=positive_kwargs,
                negative_kwargs=negative_kwargs if do_true_cfg else None,
                cfg_normalize=cfg_normalize,
            )
            latents = self.scheduler_step_maybe_with_cfg(noise_pred, t, latents, do_true_cfg)
        return latents


class QwenImagePipeline(QwenImageCFGParallelMixin, EnginePipeline, DiffusersQwenImagePipeline):
    """diffusers' QwenImagePipeline with CFG-Parallel, for the engine or to be called directly."""

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        vae = checkpoint.component_config("vae")
        scheduler = checkpoint.component_config("scheduler", "scheduler_config.json")
        # diffusers pipeline_qwenimage.py: two latent pixels each way make one token.
        vae_scale_factor = 2 ** len(vae["temperal_downsample"])
        side = 128 * vae_scale_factor
        return PipelineInfo(
            text=TextRules(MAX_TEXT_TOKENS, PROMPT_TEMPLATE, prefix_tokens=34),
            size_multiple=2 * vae_scale_factor,
            pixels_per_token=2 * vae_scale_factor,
            # With `shift_terminal` the schedule is stretched between its ends: one step divides by zero.
            min_steps=2 if scheduler.get("shift_terminal") else 1,
            cfg_scale="true_cfg_scale",
            default_params=DiffusionParams(
                height=side,
                width=side,
                num_inference_steps=50,
                true_cfg_scale=DEFAULT_CFG_SCALE,
                negative_prompt=None,
                cfg_normalize=True,
            ),
        )

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLQwenImage,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        transformer: QwenImageTransformer2DModel,
    ) -> None:
        packed = PackedQwenImageTransformer.adopt(transformer)
        super().__init__(scheduler, ImageQwenImageVAE.adopt(vae), text_encoder, tokenizer, packed)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        max_sequence_length: int = MAX_TEXT_TOKENS,
        cfg_normalize: bool = True,
    ) -> QwenImagePipelineOutput | tuple[Any]:
        """Generate images; under `torchrun` every rank calls this alike and returns the same images.

        Args:
            negative_prompt: None switches guidance off; an empty string is a negative prompt.
            guidance_scale, true_cfg_scale: two names of the guidance scale, which is on above 1; `true_cfg_scale` wins.
            height, width: pixels.
            generator, latents: source of the first latents, or these themselves.
            output_type: "pil", "np", "pt" or "latent".
            cfg_normalize: whether the guided prediction is brought back to the positive one's norm.

        Raises:
            InvalidRequestError: too few steps for this checkpoint's noise schedule.
        """
        height = height or self.default_sample_size * self.vae_scale_factor
        width = width or self.default_sample_size * self.vae_scale_factor
        self.check_inputs(prompt, height, width, negative_prompt, max_sequence_length=max_sequence_length)
        scale, do_true_cfg = _resolve_guidance(negative_prompt, guidance_scale, true_cfg_scale)
        encode_options: dict[str, Any] = {
            "num_images_per_prompt": num_images_per_prompt,
            "max_sequence_length": max_sequence_length,
        }
        embeds, mask = self.encode_prompt(prompt, **encode_options)
        negative_embeds, negative_mask = None, None
        if do_true_cfg and negative_prompt is not None:
            negative_embeds, negative_mask = self.encode_prompt(_as_many(negative_prompt, prompt), **encode_options)
        count = embeds.shape[0]
        latents = self._prepare_noise(count, height, width, embeds, generator, latents)
        self._set_timesteps(self.scheduler, num_inference_steps, latents.shape[1], latents.device)
        latents = self.diffuse(
            prompt_embeds=embeds,
            prompt_embeds_mask=mask,
            negative_prompt_embeds=negative_embeds,
            negative_prompt_embeds_mask=negative_mask,
            latents=same_on_all_ranks(latents),
            img_shapes=[[self._image_shape(height, width)]] * count,
            txt_seq_lens=None,
            negative_txt_seq_lens=None,
            timesteps=self.scheduler.timesteps,
            do_true_cfg=do_true_cfg,
            guidance=None,
            true_cfg_scale=scale,
            cfg_normalize=cfg_normalize,
        )
        images: Any = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(
                self._decode_latents(latents, height, width), output_type=output_type
            )
        self.maybe_free_model_hooks()
        return QwenImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        prompt = request.prompts[branch]
        return PromptEmbeds(self.encode_prompt(prompt, self._weight.device, max_sequence_length=MAX_TEXT_TOKENS)[0][0])

    def draw_noise(self, request: DiffusionRequest) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(request.seed)
        return self._prepare_noise(1, request.height, request.width, self._weight, generator)

    def make_noise_scheduler(self, request: DiffusionRequest) -> Any:
        # Its numbers stay on the CPU: reading one from a GPU would wait for all that is queued there.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        self._set_timesteps(scheduler, request.num_inference_steps, request.image_tokens, torch.device("cpu"))
        return scheduler

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        dtype = branches[0].latents.dtype
        ahead = [branch.timesteps_ahead for branch in branches if branch.timesteps_ahead is not None]
        return {
            "hidden_states": torch.cat([branch.latents for branch in branches], dim=1),
            "timestep": torch.stack([branch.timestep for branch in branches]).to(dtype) / 1000,
            "timesteps_ahead": torch.cat(ahead).to(dtype) / 1000 if len(ahead) == len(branches) else None,
            "guidance": None,
            "encoder_hidden_states": torch.cat([branch.embeds.tokens for branch in branches])[None],
            "encoder_hidden_states_mask": None,
            "img_shapes": [[self._image_shape(branch.request.height, branch.request.width)] for branch in branches],
            "txt_seq_lens": [branch.embeds.tokens.shape[0] for branch in branches],
        }

    def unpack_predictions(self, prediction: torch.Tensor, branches: Sequence[BranchInput]) -> list[torch.Tensor]:
        return list(prediction.split([branch.latents.shape[1] for branch in branches], dim=1))

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, request: DiffusionRequest, condition: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        image = self._decode_latents(latents, request.height, request.width)
        return to_uint8(self.image_processor.postprocess(image, output_type="np"))

    def forget_derived(self) -> None:
        self.transformer.modulations.clear()

    def prediction_shape(self, request: DiffusionRequest) -> tuple[int, ...]:
        return request.image_tokens, self.transformer.config.in_channels

    @property
    def _weight(self) -> torch.Tensor:
        """Any weight, for its device and dtype: diffusers' own properties search all modules for milliseconds."""
        return self.transformer.img_in.weight

    def _image_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(frames, height, width) of an image in tokens."""
        side = 2 * self.vae_scale_factor
        return 1, height // side, width // side

    def _prepare_noise(
        self,
        count: int,
        height: int,
        width: int,
        like: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """First latents, [count, image tokens, channels], of the dtype and on the device of `like`."""
        channels = self.transformer.config.in_channels // 4
        return self.prepare_latents(count, channels, height, width, like.dtype, like.device, generator, latents)

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, image_tokens: int, device: torch.device) -> None:
        """Set a noise scheduler to the first of its steps, as diffusers' pipeline does."""
        config = scheduler.config
        if config.get("shift_terminal") and num_inference_steps < 2:
            # The schedule is stretched between its first and last sigma: upstream divides by zero with one step.
            raise InvalidRequestError("num_inference_steps", num_inference_steps, "at least 2 for this model")
        shift = calculate_shift(
            image_tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
        retrieve_timesteps(scheduler, device=device, sigmas=sigmas, mu=shift)
        scheduler.set_begin_index(0)

    def _decode_latents(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[batch, 3, height, width] in -1..1; the end of diffusers' `__call__`, which is no method of its own there."""
        latents = self._unpack_latents(latents, height, width, self.vae_scale_factor).to(self.vae.dtype)
        config = self.vae.config
        mean, std = (
            torch.tensor(values).view(1, config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)
            for values in (config.latents_mean, config.latents_std)
        )
        return self.vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]


def _resolve_guidance(
    negative_prompt: str | list[str] | None, guidance_scale: float | None, true_cfg_scale: float | None
) -> tuple[float, bool]:
    """(guidance scale, whether guidance is on); says once why, where it was asked for and is off."""
    asked = guidance_scale if true_cfg_scale is None else true_cfg_scale
    scale = DEFAULT_CFG_SCALE if asked is None else asked
    if negative_prompt is not None and scale <= 1:
        log_once(f"guidance is off: a negative prompt was given, but the guidance scale {scale:g} is not above 1")
    elif asked is not None and scale > 1 and negative_prompt is None:
        log_once(f"guidance is off: the scale is {scale:g}, but there is no negative prompt (an empty one is enough)")
    return scale, scale > 1 and negative_prompt is not None


def _as_many(negative_prompt: str | list[str], prompt: str | list[str]) -> str | list[str]:
    """One negative prompt serves all prompts of a list."""
    if isinstance(negative_prompt, str) and isinstance(prompt, list):
        return [negative_prompt] * len(prompt)
    return negative_prompt
