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
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.utils import apply_lora_scale

from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.worker.packing import PackedRows, interleave, pad_rows

ImageShape = tuple[tuple[int, int, int], ...]  # (frames, height, width) in tokens of each image of one sequence

# Layouts kept per model: a layout serves every step of the requests that run together.
_MAX_LAYOUTS = 32


@dataclass(frozen=True)
class JointLayout:
    """Where the sequences of one packed batch lie, and what follows from it alone.

    Attributes:
        text, image: the two streams.
        joint: the stream of attention: text then image of sequence 0, of sequence 1, ...
        rotation: complex rotary factors of the joint stream, [rows, 1, head_dim / 2].
    """

    text: PackedRows
    image: PackedRows
    joint: PackedRows
    rotation: torch.Tensor


class PackedQwenImageTransformer(QwenImageTransformer2DModel):
    """diffusers' QwenImageTransformer2DModel with a packed forward; for inference only."""

    _layouts: dict[Any, JointLayout]

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
        sample = self._forward_rows(hidden_states.flatten(0, 1), text, timestep, layout)
        sample = sample.view(*hidden_states.shape[:2], -1)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _forward_rows(
        self, latents: torch.Tensor, prompts: torch.Tensor, timestep: torch.Tensor, layout: JointLayout
    ) -> torch.Tensor:
        """[image tokens, channels] of all sequences from latents and prompt embeddings, both [tokens, ...]."""
        image = self.img_in(pad_rows(latents))
        text = self.txt_in(_rms_norm(self.txt_norm, pad_rows(prompts)))
        embedded = self.time_text_embed(pad_rows(timestep.to(image.dtype)), image)  # [>= n, dim]
        time = F.silu(embedded)
        for block in self.transformer_blocks:
            is_last = block is self.transformer_blocks[-1]
            image, text = _forward_block(block, image, text, time, layout, is_last)
        scale, shift = self.norm_out.linear(time).chunk(2, dim=1)
        image = layout.image.scale_(self.norm_out.norm(image), 1 + scale, shift)
        return self.proj_out(image)[: layout.image.total]

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


def _forward_block(
    block: Any,
    image: torch.Tensor,
    text: torch.Tensor,
    time: torch.Tensor,
    layout: JointLayout,
    is_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One of diffusers' dual-stream blocks on image and text [rows, dim], both changed in place; time is [>= n, dim].

    Nothing reads the last block's text, so that is not computed.
    """
    image_mod = block.img_mod[1](time).chunk(6, dim=-1)  # shift, scale, gate of attention, then of the MLP
    text_mod = block.txt_mod[1](time).chunk(6, dim=-1)
    image_out, text_out = _attend(
        block.attn,
        layout.image.scale_(block.img_norm1(image), 1 + image_mod[1], image_mod[0]),
        layout.text.scale_(block.txt_norm1(text), 1 + text_mod[1], text_mod[0]),
        layout,
    )
    image += layout.image.scale_(image_out, image_mod[2])
    image_in = layout.image.scale_(block.img_norm2(image), 1 + image_mod[4], image_mod[3])
    image += layout.image.scale_(block.img_mlp(image_in), image_mod[5])
    if is_last:
        return image, text
    text += layout.text.scale_(text_out, text_mod[2])
    text_in = layout.text.scale_(block.txt_norm2(text), 1 + text_mod[4], text_mod[3])
    text += layout.text.scale_(block.txt_mlp(text_in), text_mod[5])
    if image.dtype == torch.float16:  # like upstream: keep an overflow finite
        image, text = image.clip_(-65504, 65504), text.clip_(-65504, 65504)
    return image, text


def _attend(
    attn: Any, image: torch.Tensor, text: torch.Tensor, layout: JointLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint attention of each sequence's text and image; streams are [rows, dim]."""
    heads = (-1, attn.inner_dim // attn.heads)  # under tensor parallelism a rank holds some of the heads
    query_key = interleave(
        layout.text,
        layout.image,
        (
            _rms_norm(attn.norm_added_q, attn.add_q_proj(text).unflatten(-1, heads)),
            _rms_norm(attn.norm_q, attn.to_q(image).unflatten(-1, heads)),
            _rms_norm(attn.norm_added_k, attn.add_k_proj(text).unflatten(-1, heads)),
            _rms_norm(attn.norm_k, attn.to_k(image).unflatten(-1, heads)),
        ),
    )
    value = interleave(layout.text, layout.image, (attn.add_v_proj(text), attn.to_v(image)))[0].unflatten(-1, heads)
    query, key = _rotate(query_key, layout.rotation).unbind(0)
    attended = _attend_sequences(query, key, value, layout, attn.processor)
    texts, images = zip(
        *(rows.split((t, i)) for rows, t, i in zip(attended, layout.text.lengths, layout.image.lengths, strict=True)),
        strict=True,
    )
    return attn.to_out[0](layout.image.join(images)), attn.to_add_out(layout.text.join(texts))


def _rms_norm(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """diffusers' RMSNorm as the one operation that torch has for it; the same numbers in float32."""
    return F.rms_norm(x, norm.dim, norm.weight, norm.eps)


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [..., rows, heads, head_dim], neighbours paired as complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


def _attend_sequences(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: JointLayout, processor: Any
) -> list[torch.Tensor]:
    """Each sequence's attention to itself, [length, heads * head_dim]; inputs are [rows, heads, head_dim]."""
    joint = layout.joint
    if _has_varlen_kernel(query, processor):
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (stream[: joint.total] for stream in (query, key, value))
        longest = max(joint.lengths)
        out: Any = varlen_attn(query, key, value, joint.boundaries, joint.boundaries, longest, longest)
        return joint.split(out.flatten(1))
    attended: list[torch.Tensor] = []
    for run in joint.runs:
        # A kernel works on one sequence and head at a time: a run of equal lengths gives the same bits as one by one.
        out = dispatch_attention_fn(
            run.block(query), run.block(key), run.block(value), backend=processor._attention_backend
        )
        attended += out.flatten(2).unbind(0)
    return attended


def _has_varlen_kernel(query: torch.Tensor, processor: Any) -> bool:
    """Whether torch's varlen flash attention runs here and the user chose no other backend for diffusers."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and processor._attention_backend is None
        and _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    )


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
