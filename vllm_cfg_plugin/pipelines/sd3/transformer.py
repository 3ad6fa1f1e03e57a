"""Stable Diffusion 3's transformer over packed sequences, on diffusers' own weights; must not import vLLM.

Same network as diffusers' `transformer_sd3.py`; see `mmdit.py` for its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.utils import apply_lora_scale

from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.common.adopt import become
from vllm_cfg_plugin.pipelines.common.attention import JointLayout, make_joint_layout
from vllm_cfg_plugin.pipelines.common.linear import linear
from vllm_cfg_plugin.pipelines.common.mmdit import DUAL_BLOCK_PLAN, block_modulations, forward_blocks, rows_of
from vllm_cfg_plugin.pipelines.common.modulation import Modulation, by_modulation, some_rows
from vllm_cfg_plugin.pipelines.common.packing import LayoutCache, pad_rows
from vllm_cfg_plugin.pipelines.common.upload import upload

Grid = tuple[int, int]  # (height, width) of an image in tokens


class PackedSD3Transformer(SD3Transformer2DModel):
    """diffusers' SD3Transformer2DModel with a packed forward; for inference only."""

    tensor_plan: ClassVar = DUAL_BLOCK_PLAN

    _layouts: LayoutCache

    # Of adapters: the layers that make modulations, and the parts whose layers diffusers' own code calls.
    modulation_layers: ClassVar[tuple[str, ...]] = ("norm1.linear", "norm1_context.linear", "norm_out.linear")
    closed_parts: ClassVar[tuple[str, ...]] = ("time_text_embed",)

    @classmethod
    def adopt(cls, transformer: SD3Transformer2DModel) -> Self:
        """Give a loaded transformer the packed forward: the object itself, see `become`.

        Raises:
            ConfigurationError: a normalisation of queries and keys that the packed forward lacks.
        """
        if transformer.config["qk_norm"] not in (None, "rms_norm"):
            raise ConfigurationError(
                f"transformer/config.json: qk_norm={transformer.config['qk_norm']!r} is not supported: it must be "
                "'rms_norm' or null"
            )
        return become(cls, transformer, _layouts=LayoutCache())

    @apply_lora_scale("joint_attention_kwargs")
    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_shapes: Sequence[Grid],
        txt_seq_lens: Sequence[int],
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict noise for n packed sequences.

        Args:
            hidden_states: latents, [1, all image tokens, channels * patch * patch] as `patchify` makes them.
            encoder_hidden_states: prompt embeddings, [1, all text tokens, dim].
            pooled_projections: pooled prompt embeddings, [n, dim].
            timestep: [n], in 0..1000.
            img_shapes, txt_seq_lens: each sequence's (height, width) of its image in tokens, and text tokens.
            joint_attention_kwargs: `scale` weighs the LoRA layers.

        Returns:
            Predictions, laid out like `hidden_states`.

        Raises:
            ValueError: the sequences don't fill the streams, or there is not one of each per timestep.
        """
        count, patch = timestep.shape[0], self.config["patch_size"]
        grids, text_lengths = tuple(img_shapes), tuple(txt_seq_lens)
        if not len(grids) == len(text_lengths) == count:
            raise ValueError(
                f"img_shapes and txt_seq_lens have {len(grids)} and {len(text_lengths)} entries for {count} timesteps: "
                "there must be one per sequence"
            )
        layout, positions = self._layouts.get(
            (grids, text_lengths, hidden_states.device),
            lambda: self._make_layout(grids, text_lengths, hidden_states.device),
        )
        latents = rows_of("hidden_states", hidden_states, layout.image.lengths)
        prompts = rows_of("encoder_hidden_states", encoder_hidden_states, text_lengths)
        image = self._embed_patches(layout.image.window(latents), positions)
        text = linear(self.context_embedder, layout.text.window(prompts), layout.text)
        sample = forward_blocks(self, image, text, self._modulations(timestep, pooled_projections), layout)
        # The output layer gives [patch, patch, channels] where the input has [channels, patch, patch].
        sample = (
            sample.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2).flatten(1).view(*hidden_states.shape[:2], -1)
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _modulations(self, timestep: torch.Tensor, pooled: torch.Tensor) -> list[Modulation]:
        """The modulation of each sequence, bitwise independent of the others."""

        def of(numbers: Sequence[int]) -> list[Modulation]:
            own = pad_rows(upload(some_rows(timestep, numbers), pooled.device)), pad_rows(some_rows(pooled, numbers))
            return block_modulations(self, self.time_text_embed(*own), len(numbers))

        return by_modulation(timestep.shape[0], of)

    def _embed_patches(self, latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[rows, dim] from patches [rows, channels * patch * patch]: one image each to the convolution."""
        patch = self.config["patch_size"]
        embedded = self.pos_embed.proj(latents.unflatten(1, (-1, patch, patch))).flatten(1)
        return (embedded + positions).to(embedded.dtype)

    def _make_layout(
        self, grids: tuple[Grid, ...], text_lengths: tuple[int, ...], device: torch.device
    ) -> tuple[JointLayout, torch.Tensor]:
        """The layout, and the position embedding of the rows of this rank's window of the image, [rows, dim]."""
        layout = make_joint_layout(text_lengths, tuple(height * width for height, width in grids), (), device)
        patch = self.config["patch_size"]
        embeds = [self.pos_embed.cropped_pos_embed(height * patch, width * patch)[0] for height, width in grids]
        return layout, layout.image.window(layout.image.join(embeds))


def patchify(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """[n, tokens, channels * patch * patch] of latents [n, channels, height, width]."""
    count, channels, height, width = latents.shape
    patches = latents.view(count, channels, height // patch, patch, width // patch, patch)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * patch * patch)


def unpatchify(tokens: torch.Tensor, grid: Grid, patch: int) -> torch.Tensor:
    """[n, channels, height, width] of tokens [n, tokens, channels * patch * patch], of a `grid`."""
    patches = tokens.unflatten(1, grid).unflatten(-1, (-1, patch, patch))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
