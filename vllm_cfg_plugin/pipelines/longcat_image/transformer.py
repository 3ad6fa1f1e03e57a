"""LongCat-Image's transformer over packed sequences, on diffusers' own weights; must not import vLLM.

Same network as diffusers' `transformer_longcat_image.py`; see `mmdit.py` for its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_longcat_image import LongCatImageTransformer2DModel

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
from vllm_cfg_plugin.pipelines.common.modulation import Modulation, ModulationCache, modulations_at
from vllm_cfg_plugin.pipelines.common.packing import LayoutCache, pad_rows
from vllm_cfg_plugin.pipelines.common.upload import upload


class PackedLongCatImageTransformer(LongCatImageTransformer2DModel):
    """diffusers' LongCatImageTransformer2DModel with a packed forward; for inference only."""

    tensor_plan: ClassVar = {**DUAL_BLOCK_PLAN, **SINGLE_BLOCK_PLAN}

    _layouts: LayoutCache
    modulations: ModulationCache

    # Of adapters: the layers that make modulations, and the parts whose layers diffusers' own code calls.
    modulation_layers: ClassVar[tuple[str, ...]] = (
        "norm1.linear",
        "norm1_context.linear",
        "norm.linear",
        "norm_out.linear",
    )
    closed_parts: ClassVar[tuple[str, ...]] = ("time_embed",)

    @classmethod
    def adopt(cls, transformer: LongCatImageTransformer2DModel) -> Self:
        """Give a loaded transformer the packed forward: the object itself, see `become`."""
        return become(cls, transformer, _layouts=LayoutCache(), modulations=ModulationCache())

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: Sequence[torch.Tensor],
        txt_ids: Sequence[torch.Tensor],
        guidance: None = None,
        return_dict: bool = True,
        timesteps_ahead: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict noise for n packed sequences.

        Args:
            hidden_states: latents, [1, all image tokens, channels].
            encoder_hidden_states: prompt embeddings, [1, all text tokens, dim].
            timestep: [n], in 0..1.
            img_ids, txt_ids: positions of each sequence's tokens, n tensors [tokens, 3], which also tell the sequences
                apart. They must not be changed in place between calls.
            guidance: LongCat-Image has no guidance embedding.
            timesteps_ahead: timesteps of later calls, see `modulations_at`.

        Returns:
            Predictions, laid out like `hidden_states`.

        Raises:
            ValueError: the sequences don't fill the streams, or there is not one of each per timestep.
        """
        layout = layout_of_ids(self._layouts, self.pos_embed, img_ids, txt_ids, timestep.shape[0], hidden_states.device)
        latents = rows_of("hidden_states", hidden_states, layout.image.lengths)
        prompts = rows_of("encoder_hidden_states", encoder_hidden_states, layout.text.lengths)
        image = linear(self.x_embedder, layout.image.window(latents), layout.image)
        text = linear(self.context_embedder, layout.text.window(prompts), layout.text)
        modulations = modulations_at(self, timestep, timesteps_ahead, hidden_states.dtype)
        sample = forward_blocks(self, image, text, modulations, layout).view(*hidden_states.shape[:2], -1)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def compute_modulations(self, timesteps: Sequence[float], dtype: torch.dtype) -> list[Modulation]:
        """The modulation of each timestep (in 0..1), bitwise independent of the others."""
        values = upload(torch.tensor(timesteps, dtype=dtype), self.x_embedder.weight.device)
        return block_modulations(self, self.time_embed(pad_rows(values) * 1000, dtype), len(timesteps))
