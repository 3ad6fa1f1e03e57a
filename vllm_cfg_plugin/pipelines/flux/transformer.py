"""Flux's transformer over packed sequences, on diffusers' own weights; must not import vLLM.

Same network as diffusers' `transformer_flux.py`; see `mmdit.py` for its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.utils import apply_lora_scale

from vllm_cfg_plugin.pipelines.common.adopt import become
from vllm_cfg_plugin.pipelines.common.linear import linear
from vllm_cfg_plugin.pipelines.common.mmdit import (
    DUAL_BLOCK_PLAN,
    SINGLE_BLOCK_PLAN,
    block_modulations,
    forward_blocks,
    layout_of_ids,
    rows_of,
)
from vllm_cfg_plugin.pipelines.common.modulation import Modulation, by_modulation, some_rows
from vllm_cfg_plugin.pipelines.common.packing import LayoutCache, pad_rows
from vllm_cfg_plugin.pipelines.common.upload import upload


class PackedFluxTransformer(FluxTransformer2DModel):
    """diffusers' FluxTransformer2DModel with a packed forward; for inference only."""

    tensor_plan: ClassVar = {**DUAL_BLOCK_PLAN, **SINGLE_BLOCK_PLAN}

    _layouts: LayoutCache

    # Of adapters: the layers that make modulations, and the parts whose layers diffusers' own code calls.
    modulation_layers: ClassVar[tuple[str, ...]] = (
        "norm1.linear",
        "norm1_context.linear",
        "norm.linear",
        "norm_out.linear",
    )
    closed_parts: ClassVar[tuple[str, ...]] = ("time_text_embed",)

    @classmethod
    def adopt(cls, transformer: FluxTransformer2DModel) -> Self:
        """Give a loaded transformer the packed forward: the object itself, see `become`."""
        return become(cls, transformer, _layouts=LayoutCache())

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: Sequence[torch.Tensor],
        txt_ids: Sequence[torch.Tensor],
        guidance: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict noise for n packed sequences.

        Args:
            hidden_states: latents, [1, all image tokens, channels].
            encoder_hidden_states: prompt embeddings, [1, all text tokens, dim].
            pooled_projections: pooled prompt embeddings, [n, dim].
            timestep: [n], in 0..1.
            img_ids, txt_ids: positions of each sequence's tokens, n tensors [tokens, 3], which also tell the sequences
                apart. They must not be changed in place between calls.
            guidance: embedded guidance scales, [n], where the checkpoint was distilled with them; otherwise None.
            joint_attention_kwargs: `scale` weighs the LoRA layers.

        Returns:
            Predictions, laid out like `hidden_states`.

        Raises:
            ValueError: the sequences don't fill the streams, there is not one of each per timestep, or `guidance` is
                missing or not wanted.
        """
        layout = layout_of_ids(self._layouts, self.pos_embed, img_ids, txt_ids, timestep.shape[0], hidden_states.device)
        latents = rows_of("hidden_states", hidden_states, layout.image.lengths)
        prompts = rows_of("encoder_hidden_states", encoder_hidden_states, layout.text.lengths)
        image = linear(self.x_embedder, layout.image.window(latents), layout.image)
        text = linear(self.context_embedder, layout.text.window(prompts), layout.text)
        modulations = self._modulations(timestep, guidance, pooled_projections, hidden_states.dtype)
        sample = forward_blocks(self, image, text, modulations, layout).view(*hidden_states.shape[:2], -1)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _modulations(
        self, timestep: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor, dtype: torch.dtype
    ) -> list[Modulation]:
        """The modulation of each sequence, bitwise independent of the others."""
        if (guidance is not None) != bool(self.config["guidance_embeds"]):
            remedy = "pass one scale per sequence" if guidance is None else "it must be None"
            raise ValueError(
                f"guidance={guidance} is not valid for a checkpoint with guidance_embeds="
                f"{self.config['guidance_embeds']}: {remedy}"
            )
        scalars = [timestep] if guidance is None else [timestep, guidance]

        def of(numbers: Sequence[int]) -> list[Modulation]:
            own = [upload(some_rows(values, numbers).to(dtype), pooled.device) for values in scalars]
            embedded = self.time_text_embed(
                *(pad_rows(values) * 1000 for values in own), pad_rows(some_rows(pooled, numbers))
            )
            return block_modulations(self, embedded, len(numbers))

        return by_modulation(timestep.shape[0], of)
