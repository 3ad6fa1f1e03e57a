"""Qwen-Image's transformer over packed sequences, on diffusers' own weights; must not import vLLM.

Same network as diffusers' `transformer_qwenimage.py`, but n sequences lie end to end in one stream: each has its own
image size, text length and timestep, attends to itself alone, and none is padded to another's length. See
`worker/packing.py` for why a sequence's result is bitwise the same in any company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.utils import apply_lora_scale

from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.linear import feed_forward, linear
from vllm_cfg_plugin.pipelines.modulation import Factors, Modulation, ModulationCache, compute_modulations
from vllm_cfg_plugin.pipelines.qwen_image_attention import JointLayout, attend, rms_norm
from vllm_cfg_plugin.worker.packing import PackedRows, pad_rows

ImageShape = tuple[tuple[int, int, int], ...]  # (frames, height, width) in tokens of each image of one sequence

# Layouts kept per model: a layout serves every step of the requests that run together.
_MAX_LAYOUTS = 32


@dataclass(frozen=True)
class _Span:
    """Neighbouring sequences at one timestep: its modulation, and their rows of both streams."""

    modulation: Modulation
    text: slice
    image: slice


class PackedQwenImageTransformer(QwenImageTransformer2DModel):
    """diffusers' QwenImageTransformer2DModel with a packed forward; for inference only."""

    _layouts: dict[Any, JointLayout]
    modulations: ModulationCache

    @classmethod
    def adopt(cls, transformer: QwenImageTransformer2DModel) -> Self:
        """The packed model over a loaded transformer's own modules; no weight is copied.

        Raises:
            ConfigurationError: the checkpoint asks for a conditioning that the packed forward lacks.
        """
        for field in ("zero_cond_t", "use_additional_t_cond", "guidance_embeds"):
            if transformer.config.get(field):
                raise ConfigurationError(f"transformer/config.json: {field}=true is not supported: it must be false")
        packed = cls.__new__(cls)
        packed.__dict__ = transformer.__dict__
        packed._layouts = {}
        packed.modulations = ModulationCache()
        return packed

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
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict noise for n sequences, packed or as an ordinary batch.

        Args:
            hidden_states: latents, packed [1, all image tokens, channels] or a batch [n, image tokens, channels].
            encoder_hidden_states: prompt embeddings, packed [1, all text tokens, dim] or a batch [n, text tokens, dim].
            encoder_hidden_states_mask: of a batch, [n, text tokens]: ones, then zeros where a row is padding.
            timestep: [n], in 0..1.
            img_shapes: for each sequence the (frames, height, width) of its images, in tokens.
            txt_seq_lens: text tokens of each sequence; needed to tell packed sequences apart.
            guidance: Qwen-Image has no guidance embedding.
            attention_kwargs: `scale` weighs the LoRA layers.
            timesteps_ahead: timesteps of later calls, [any number], which are modulated on the side; None where weights
                may change between calls: then nothing of a timestep is remembered.

        Returns:
            Predictions, laid out like `hidden_states`.

        Raises:
            ValueError: the sequences don't fill the streams, or a mask is not ones followed by zeros.
        """
        if timestep is None:
            raise ValueError("timestep=None is not valid: pass one value in 0..1 per sequence")
        shapes = _image_shapes(img_shapes, timestep.shape[0])
        text_lengths = _text_lengths(encoder_hidden_states, encoder_hidden_states_mask, txt_seq_lens)
        if len(text_lengths) != len(shapes):
            raise ValueError(f"there are {len(text_lengths)} texts for {len(shapes)} timesteps: give one per sequence")
        image_lengths = tuple(sum(prod(image) for image in shape) for shape in shapes)
        _check_fills("hidden_states", hidden_states, image_lengths)
        layout = self._layout_of(shapes, image_lengths, text_lengths, hidden_states.device)
        text = _text_rows(encoder_hidden_states, text_lengths)
        modulations = self._modulations(timestep, timesteps_ahead, hidden_states.dtype)
        sample = self._forward_rows(hidden_states.flatten(0, 1), text, modulations, layout)
        sample = sample.view(*hidden_states.shape[:2], -1)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _forward_rows(
        self, latents: torch.Tensor, prompts: torch.Tensor, modulations: Sequence[Modulation], layout: JointLayout
    ) -> torch.Tensor:
        """[image tokens, channels] of all sequences from latents and prompt embeddings, both [tokens, ...]."""
        spans = _spans(modulations, layout)
        image = linear(self.img_in, pad_rows(latents))
        text = linear(self.txt_in, rms_norm(self.txt_norm, pad_rows(prompts)))
        for number, block in enumerate(self.transformer_blocks):
            is_last = number == len(self.transformer_blocks) - 1
            _forward_block(block, image, text, spans, number, layout, is_last)
        factors = [(span.modulation.shift, span.modulation.scale) for span in spans]
        image = _modulate(self.norm_out.norm, image, [span.image for span in spans], factors, 0)
        return linear(self.proj_out, image)[: layout.image.total]

    def _modulations(
        self, timestep: torch.Tensor, timesteps_ahead: torch.Tensor | None, dtype: torch.dtype
    ) -> list[Modulation]:
        """The modulation of each sequence: one object for equal timesteps."""
        timesteps = timestep.to(dtype).tolist()
        if timesteps_ahead is not None:
            return self.modulations.get(self, timesteps, timesteps_ahead.to(dtype), dtype)
        distinct = list(dict.fromkeys(timesteps))
        of_timestep = dict(zip(distinct, compute_modulations(self, distinct, dtype), strict=True))
        return [of_timestep[t] for t in timesteps]

    def _layout_of(
        self,
        shapes: tuple[ImageShape, ...],
        image_lengths: tuple[int, ...],
        text_lengths: tuple[int, ...],
        device: torch.device,
    ) -> JointLayout:
        key = (shapes, text_lengths, device)
        layout = self._layouts.pop(key, None)
        if layout is None:
            layout = self._make_layout(shapes, image_lengths, text_lengths, device)
            if len(self._layouts) >= _MAX_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
        self._layouts[key] = layout  # last in, so the first is the one unused for longest
        return layout

    def _make_layout(
        self,
        shapes: tuple[ImageShape, ...],
        image_lengths: tuple[int, ...],
        text_lengths: tuple[int, ...],
        device: torch.device,
    ) -> JointLayout:
        text, image = PackedRows(text_lengths, device), PackedRows(image_lengths, device)
        joint = PackedRows(tuple(t + i for t, i in zip(text_lengths, image_lengths, strict=True)), device)
        rotations = []
        for shape, text_length in zip(shapes, text_lengths, strict=True):
            image_rotation, text_rotation = self.pos_embed([list(shape)], max_txt_seq_len=text_length, device=device)
            rotations += [text_rotation, image_rotation]
        rotation = F.pad(torch.cat(rotations), [0, 0, 0, text.sizes[-1] + image.sizes[-1]])
        return JointLayout(text, image, joint, rotation[:, None])


def _spans(modulations: Sequence[Modulation], layout: JointLayout) -> list[_Span]:
    """The sequences in maximal spans of one modulation."""
    firsts = [i for i, own in enumerate(modulations) if i == 0 or own is not modulations[i - 1]]
    texts, images = layout.text.cut(firsts), layout.image.cut(firsts)
    return [_Span(modulations[i], text, image) for i, text, image in zip(firsts, texts, images, strict=True)]


def _forward_block(
    block: Any,
    image: torch.Tensor,
    text: torch.Tensor,
    spans: Sequence[_Span],
    number: int,
    layout: JointLayout,
    is_last: bool,
) -> None:
    """Block `number` of diffusers' dual-stream blocks, on image and text [rows, dim]: both are changed in place.

    Nothing reads the last block's text, so that is not computed.
    """
    factors = [span.modulation.blocks[number] for span in spans]
    images, texts = [span.image for span in spans], [span.text for span in spans]
    image_out, text_out = attend(
        block.attn,
        _modulate(block.img_norm1, image, images, factors, 0),
        _modulate(block.txt_norm1, text, texts, factors, 6),
        layout,
    )
    _add_gated(image, linear(block.attn.to_out[0], image_out), images, factors, 2)
    image_in = _modulate(block.img_norm2, image, images, factors, 3)
    _add_gated(image, feed_forward(block.img_mlp, image_in), images, factors, 5)
    if is_last:
        return
    _add_gated(text, linear(block.attn.to_add_out, text_out), texts, factors, 8)
    text_in = _modulate(block.txt_norm2, text, texts, factors, 9)
    _add_gated(text, feed_forward(block.txt_mlp, text_in), texts, factors, 11)
    if image.dtype == torch.float16:  # like upstream: keep an overflow finite
        image.clip_(-65504, 65504)
        text.clip_(-65504, 65504)


def _modulate(
    norm: Any, stream: torch.Tensor, rows: Sequence[slice], factors: Sequence[Factors], shift: int
) -> torch.Tensor:
    """The layer norm of each span's rows, with the span's own scale and shift (`factors[shift + 1]`, `[shift]`)."""
    pieces = [
        F.layer_norm(stream[span], norm.normalized_shape, own[shift + 1], own[shift], norm.eps)
        for span, own in zip(rows, factors, strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _add_gated(
    stream: torch.Tensor, change: torch.Tensor, rows: Sequence[slice], factors: Sequence[Factors], gate: int
) -> None:
    """Add a change to the stream in place, weighed by each span's own gate (`factors[gate]`)."""
    for span, own in zip(rows, factors, strict=True):
        stream[span].addcmul_(change[span], own[gate])


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
    _check_fills("encoder_hidden_states", embeds, lengths)
    return embeds.flatten(0, 1)


def _check_fills(name: str, stream: torch.Tensor, lengths: tuple[int, ...]) -> None:
    rows = stream.shape[0] * stream.shape[1]
    if rows != sum(lengths):
        raise ValueError(
            f"{name} has {rows} rows, but its sequences {list(lengths)} have {sum(lengths)}: they must be the same"
        )
