"""Qwen-Image's transformer over packed sequences, on diffusers' own weights; must not import vLLM.

Same network as diffusers' `transformer_qwenimage.py`, but n sequences lie end to end in one stream: each has its own
image size, text length and timestep, attends to itself alone, and none is padded to another's length. See
`common/packing.py` for why a sequence's result is bitwise independent of the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.utils import apply_lora_scale

from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.common.adopt import become
from vllm_cfg_plugin.pipelines.common.attention import JointLayout, make_joint_layout, rms_norm
from vllm_cfg_plugin.pipelines.common.linear import linear
from vllm_cfg_plugin.pipelines.common.mmdit import DualBlock, Spans, forward_dual_block, rows_of
from vllm_cfg_plugin.pipelines.common.modulation import (
    Modulation,
    ModulationCache,
    StreamSpans,
    modulate_last,
    modulations_at,
    project_modulations,
)
from vllm_cfg_plugin.pipelines.common.packing import LayoutCache, PackedRows, pad_rows
from vllm_cfg_plugin.pipelines.common.tensor_parallel import tensor_plan
from vllm_cfg_plugin.pipelines.common.upload import upload
from vllm_cfg_plugin.pipelines.offload import in_turn

ImageShape = tuple[tuple[int, int, int], ...]  # (frames, height, width) in tokens of each image of one sequence


_BLOCKS = "transformer_blocks.*"


class PackedQwenImageTransformer(QwenImageTransformer2DModel):
    """diffusers' QwenImageTransformer2DModel with a packed forward; for inference only."""

    tensor_plan: ClassVar = tensor_plan(
        own=[f"{_BLOCKS}.attn.to_[qkv]", f"{_BLOCKS}.attn.add_[qkv]_proj", f"{_BLOCKS}.*_mlp.net.0.proj"],
        summed=[f"{_BLOCKS}.attn.to_out.0", f"{_BLOCKS}.attn.to_add_out", f"{_BLOCKS}.*_mlp.net.2"],
        gathered=[f"{_BLOCKS}.*_mod.1"],
    )
    _layouts: LayoutCache
    modulations: ModulationCache

    # Of adapters: the layers that make modulations, and the parts whose layers diffusers' own code calls.
    modulation_layers: ClassVar[tuple[str, ...]] = ("img_mod.1", "txt_mod.1", "norm_out.linear")
    closed_parts: ClassVar[tuple[str, ...]] = ("time_text_embed",)

    @classmethod
    def adopt(cls, transformer: QwenImageTransformer2DModel) -> Self:
        """Give a loaded transformer the packed forward: the object itself, see `become`.

        Raises:
            ConfigurationError: the checkpoint asks for a conditioning that the packed forward lacks.
        """
        if transformer.config.get("guidance_embeds"):
            raise ConfigurationError("transformer/config.json: guidance_embeds=true is not supported: it must be false")
        return become(cls, transformer, _layouts=LayoutCache(), modulations=ModulationCache())

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        img_shapes: Sequence[Any] = (),
        txt_seq_lens: Sequence[int] | None = None,
        guidance: None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        timesteps_ahead: torch.Tensor | None = None,
        additional_t_cond: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict noise for n sequences, packed or as an ordinary batch.

        Args:
            hidden_states: latents, packed [1, all image tokens, channels] or a batch [n, image tokens, channels].
            encoder_hidden_states: prompt embeddings, packed [1, all text tokens, dim] or a batch [n, text tokens, dim].
            encoder_hidden_states_mask: of a batch, [n, text tokens]: ones, then zeros where a row is padding.
            timestep: [n], in 0..1.
            img_shapes: for each sequence the (frames, height, width) of its images, in tokens: the one to be denoised
                first (or all layers of it), then those that are its condition.
            txt_seq_lens: text tokens of each sequence; needed to tell packed sequences apart.
            guidance: Qwen-Image has no guidance embedding.
            attention_kwargs: `scale` weighs the LoRA layers.
            timesteps_ahead: timesteps of later calls, [any number], which are modulated on the side; None where weights
                may change between calls: then nothing of a timestep is remembered.
            additional_t_cond: zeros, which None stands for too: upstream's pipelines know no other value.

        Returns:
            Predictions, laid out like `hidden_states`.

        Raises:
            ValueError: the sequences don't fill the streams, or a mask is not ones followed by zeros.
        """
        if timestep is None:
            raise ValueError("timestep=None is not valid: pass one value in 0..1 per sequence")
        if additional_t_cond is not None and bool(additional_t_cond.any()):
            raise ValueError(f"additional_t_cond={additional_t_cond.tolist()} is not valid: it must be zeros")
        shapes = _image_shapes(img_shapes, timestep.shape[0])
        text_lengths = _text_lengths(encoder_hidden_states, encoder_hidden_states_mask, txt_seq_lens)
        if len(text_lengths) != len(shapes):
            raise ValueError(f"there are {len(text_lengths)} texts for {len(shapes)} timesteps: give one per sequence")
        image_lengths = tuple(sum(prod(image) for image in shape) for shape in shapes)
        latents = rows_of("hidden_states", hidden_states, image_lengths)
        layout = self._layouts.get(
            (shapes, text_lengths, hidden_states.device),
            lambda: self._make_layout(shapes, image_lengths, text_lengths, hidden_states.device),
        )
        text = _text_rows(encoder_hidden_states, text_lengths)
        # The second half of the modulations is that of clean images.
        times = torch.cat([timestep, torch.zeros_like(timestep)]) if self.zero_cond_t else timestep
        modulations = modulations_at(self, times, timesteps_ahead, hidden_states.dtype)
        spans = Spans.of(modulations[: len(shapes)], layout)
        if self.zero_cond_t:
            spans = dataclasses.replace(spans, image=_spans_of_images(shapes, modulations, layout.image.device))
        sample = self._forward_rows(
            latents, text, spans, StreamSpans.of(modulations[: len(shapes)], layout.image), layout
        )
        sample = sample.view(*hidden_states.shape[:2], -1)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _forward_rows(
        self, latents: torch.Tensor, prompts: torch.Tensor, spans: Spans, last: StreamSpans, layout: JointLayout
    ) -> torch.Tensor:
        """[image tokens, channels] of all sequences from latents and prompt embeddings, both [tokens, ...].

        Args:
            last: spans of the image after the last block.
        """
        image = linear(self.img_in, layout.image.window(latents), layout.image)
        text = linear(self.txt_in, rms_norm(self.txt_norm, layout.text.window(prompts)), layout.text)
        for number, block in enumerate(in_turn(self.transformer_blocks)):
            is_last = number == len(self.transformer_blocks) - 1
            forward_dual_block(_parts(block, is_last), image, text, spans, number, layout)
        image = modulate_last(self.norm_out.norm, image, last)
        return layout.image.gather(linear(self.proj_out, image, layout.image))[: layout.image.total]

    def compute_modulations(self, timesteps: Sequence[float], dtype: torch.dtype) -> list[Modulation]:
        """The modulation of each timestep (in 0..1), bitwise independent of the others."""
        weight = self.img_in.weight
        values = upload(torch.tensor(timesteps, dtype=dtype), weight.device)
        rows = pad_rows(values)
        condition = torch.zeros(rows.shape, dtype=torch.long, device=rows.device)  # read where the model has the layer
        time = F.silu(self.time_text_embed(rows, weight, condition))
        blocks = in_turn(self.transformer_blocks, "modulation")
        layers = ((block.img_mod[1], block.txt_mod[1]) for block in blocks)
        return project_modulations(layers, self.norm_out.linear, time, len(timesteps))

    def _make_layout(
        self,
        shapes: tuple[ImageShape, ...],
        image_lengths: tuple[int, ...],
        text_lengths: tuple[int, ...],
        device: torch.device,
    ) -> JointLayout:
        rotations = []
        for shape, text_length in zip(shapes, text_lengths, strict=True):
            image_rotation, text_rotation = self.pos_embed([list(shape)], max_txt_seq_len=text_length, device=device)
            rotations += [text_rotation, image_rotation]
        return make_joint_layout(text_lengths, image_lengths, rotations, device)


def _parts(block: Any, is_last: bool) -> DualBlock:
    """Nothing reads the last block's text, so that is not computed."""
    return DualBlock(
        attn=block.attn,
        image_norms=(block.img_norm1, block.img_norm2),
        text_norms=(block.txt_norm1, block.txt_norm2),
        image_mlp=block.img_mlp,
        text_mlp=None if is_last else block.txt_mlp,
    )


def _spans_of_images(
    shapes: tuple[ImageShape, ...], modulations: Sequence[Modulation], device: torch.device
) -> StreamSpans:
    """The image stream's spans where each sequence's first image has one modulation and all others another.

    Args:
        modulations: of the first images of all sequences, then of their other ones.
    """
    lengths: list[int] = []
    of_parts: list[Modulation] = []
    firsts, others = modulations[: len(shapes)], modulations[len(shapes) :]
    for (denoised, *conditions), modulation, other in zip(shapes, firsts, others, strict=True):
        lengths.append(prod(denoised))
        of_parts.append(modulation)
        if conditions:
            lengths.append(sum(prod(image) for image in conditions))
            of_parts.append(other)
    return StreamSpans.of(of_parts, PackedRows(tuple(lengths), device))


def _image_shapes(img_shapes: Sequence[Any], count: int) -> tuple[ImageShape, ...]:
    """One shape per sequence; a single one stands for all, as diffusers reads it."""
    shapes = tuple(
        tuple(tuple(image) for image in shape) if isinstance(shape[0], (list, tuple)) else (tuple(shape),)
        for shape in img_shapes
    )
    shapes = shapes * count if len(shapes) == 1 else shapes
    if len(shapes) != count:
        raise ValueError(f"img_shapes has {len(shapes)} entries for {count} timesteps: there must be one per sequence")
    return shapes


def _text_lengths(
    embeds: torch.Tensor, mask: torch.Tensor | None, txt_seq_lens: Sequence[int] | torch.Tensor | None
) -> tuple[int, ...]:
    """Text tokens of each sequence."""
    if mask is not None:
        present = mask.bool()
        lengths = present.sum(dim=1)
        ordered = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
        if not torch.equal(present, ordered):
            raise ValueError("encoder_hidden_states_mask is not valid: each row must be ones followed by zeros")
        return tuple(lengths.tolist())
    if txt_seq_lens is not None:
        return tuple(int(length) for length in txt_seq_lens)
    return (embeds.shape[1],) * embeds.shape[0]


def _text_rows(embeds: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """[all text tokens, dim] of packed [1, all text tokens, dim] or a batch [n, text tokens, dim], without padding."""
    if embeds.shape[0] == len(lengths) and len(lengths) > 1:
        return torch.cat([rows[:length] for rows, length in zip(embeds, lengths, strict=True)])
    if len(lengths) == 1:
        return embeds[0, : lengths[0]]
    return rows_of("encoder_hidden_states", embeds, lengths)
