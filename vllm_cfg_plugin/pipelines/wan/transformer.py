"""Wan's transformer over packed sequences, on diffusers' own weights; must not import vLLM.

Same network as diffusers' `transformer_wan.py`, but the tokens of n videos lie end to end in one stream: each has its
own size, number of frames, text and timesteps, attends to itself and its own text alone, and none is padded to
another's length. See `common/packing.py` for why a sequence's result is bitwise independent of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import prod
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.utils import apply_lora_scale

from vllm_cfg_plugin.pipelines.common.adopt import become
from vllm_cfg_plugin.pipelines.common.linear import feed_forward, gelu_linear, linear
from vllm_cfg_plugin.pipelines.common.modulation import (
    Modulation,
    StreamSpans,
    add_gated,
    by_modulation,
    modulate,
    modulate_last,
)
from vllm_cfg_plugin.pipelines.common.packing import LayoutCache, PackedRows, pad_rows
from vllm_cfg_plugin.pipelines.common.tensor_parallel import tensor_plan
from vllm_cfg_plugin.pipelines.common.upload import upload
from vllm_cfg_plugin.pipelines.offload import in_turn
from vllm_cfg_plugin.pipelines.wan.attention import WanLayout, attend_to_conditions, attend_to_video

Grid = tuple[int, int, int]  # (frames, height, width) of a video in tokens

_FACTORS = 6  # of a block: (shift, scale, gate) of self-attention, then of the feed-forward


class PackedWanTransformer(WanTransformer3DModel):
    """diffusers' WanTransformer3DModel with a packed forward; for inference only."""

    # The norms of queries and keys span all heads: `attention.py` adds up what they need.
    tensor_plan: ClassVar = tensor_plan(
        own=[
            "blocks.*.attn[12].to_[qkv]",
            "blocks.*.attn[12].norm_[qk]",
            "blocks.*.attn2.add_[kv]_proj",
            "blocks.*.attn2.norm_added_k",
            "blocks.*.ffn.net.0.proj",
        ],
        summed=["blocks.*.attn[12].to_out.0", "blocks.*.ffn.net.2"],
    )

    _layouts: LayoutCache

    # Of adapters: the layers that make modulations, and the parts whose layers diffusers' own code calls.
    modulation_layers: ClassVar[tuple[str, ...]] = ("condition_embedder.time_proj",)
    closed_parts: ClassVar[tuple[str, ...]] = ("condition_embedder.time_embedder", "condition_embedder.image_embedder")

    @classmethod
    def adopt(cls, transformer: WanTransformer3DModel) -> Self:
        """Give a loaded transformer the packed forward: the object itself, see `become`."""
        return become(cls, transformer, _layouts=LayoutCache())

    @apply_lora_scale("attention_kwargs")
    def forward(  # type: ignore[override]
        self,
        hidden_states: Sequence[torch.Tensor],
        timestep: Sequence[torch.Tensor],
        encoder_hidden_states: Sequence[torch.Tensor],
        encoder_hidden_states_image: Sequence[torch.Tensor] | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict noise for n videos of any sizes.

        Lists of latents, not one stream of tokens: the patch embedding is the model's own convolution. The prediction
        is one tensor, for whoever works on it element by element whatever the videos' sizes.

        Args:
            hidden_states: latents of each video, [1, channels, frames, height, width].
            timestep: of each video one value, [], or one per token, [tokens]; read on the host, so better kept there.
            encoder_hidden_states: prompt embeddings of each video, [text_tokens, dim], padding and all.
            encoder_hidden_states_image: embeddings of each video's image or images, [images, image_tokens, dim], for a
                model with `image_dim`.
            attention_kwargs: `scale` weighs the LoRA layers.

        Returns:
            The prediction, [1, channels, all videos' frames * height * width], in this order.

        Raises:
            ValueError: lists of different lengths, or inputs that don't fit the model.
        """
        latents, texts, images = hidden_states, encoder_hidden_states, encoder_hidden_states_image
        self._check(latents, timestep, texts, images)
        embedded_images = None if images is None else [self._embed_image(image) for image in images]
        grids = [self._grid(one) for one in latents]
        layout = self._layout_of(grids, latents, texts, embedded_images)
        spans = self._spans(timestep, layout.video, latents[0].dtype)
        video = layout.video.window(layout.video.join(self._embed_patches(one) for one in latents))
        text = self._embed_text(layout.text.window(layout.text.join(texts)), layout.text)
        image = None
        if embedded_images is not None and layout.image is not None:
            image = layout.image.window(layout.image.join(embedded_images))
        for number, block in enumerate(in_turn(self.blocks)):
            _forward_block(block, video, text, image, spans, number, layout)
        out = layout.video.gather(linear(self.proj_out, modulate_last(self.norm_out, video, spans), layout.video))
        videos = [self._unpatchify(*one).flatten(2) for one in zip(layout.video.split(out), grids, strict=True)]
        sample = torch.cat(videos, dim=2)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check(
        self,
        latents: Sequence[torch.Tensor],
        timesteps: Sequence[torch.Tensor],
        texts: Sequence[torch.Tensor],
        images: Sequence[torch.Tensor] | None,
    ) -> None:
        takes_image = self.condition_embedder.image_embedder is not None
        if (images is not None) != takes_image:
            takes = "an" if takes_image else "no"
            raise ValueError(f"encoder_hidden_states_image does not fit: this model takes {takes} image embedding")
        counts = [len(given) for given in (latents, timesteps, texts, images) if given is not None]
        if len(set(counts)) > 1:
            raise ValueError(f"there are {counts} latents, timesteps, texts (and images): give one per video")

    def _grid(self, latents: torch.Tensor) -> Grid:
        frames, height, width = (size // patch for size, patch in zip(latents.shape[2:], self._patch_size, strict=True))
        return frames, height, width

    @property
    def _patch_size(self) -> tuple[int, ...]:
        return self.config["patch_size"]

    def _embed_patches(self, latents: torch.Tensor) -> torch.Tensor:
        """[tokens, dim] of one video; alone, so that they are bitwise independent of the other videos."""
        patches: torch.Tensor = self.patch_embedding(latents)
        return patches[0].flatten(1).t()

    def _embed_text(self, text: torch.Tensor, rows: PackedRows) -> torch.Tensor:
        embedder = self.condition_embedder.text_embedder
        return linear(embedder.linear_2, gelu_linear(embedder.linear_1, text, rows), rows)

    def _embed_image(self, image: torch.Tensor) -> torch.Tensor:
        """[rows, dim] of one video's image embeddings; alone like `_embed_patches`."""
        embedder: Any = self.condition_embedder.image_embedder
        embedded: torch.Tensor = embedder(image)
        return embedded.flatten(0, 1)

    def _spans(self, timesteps: Sequence[torch.Tensor], rows: PackedRows, dtype: torch.dtype) -> StreamSpans:
        """This rank's window of the stream in maximal spans of one timestep; the last ends with the padding."""
        parts = [_parts(*one) for one in zip(timesteps, rows.lengths, strict=True)]

        def of(numbers: Sequence[int]) -> list[dict[float, Modulation]]:
            distinct = list(dict.fromkeys(t for number in numbers for t, _ in parts[number]))
            return [dict(zip(distinct, self._modulations(distinct, dtype), strict=True))] * len(numbers)

        at = by_modulation(len(parts), of)
        modulated = [(own[t], tokens) for own, of_video in zip(at, parts, strict=True) for t, tokens in of_video]
        spans, start = StreamSpans([], []), 0
        for _, group in groupby(modulated, lambda part: id(part[0])):
            neighbours = [*group]
            end = start + sum(tokens for _, tokens in neighbours)
            spans.modulations.append(neighbours[0][0])
            spans.rows.append(slice(start, None if end == rows.total else end))
            start = end
        return spans.window(rows)

    def _modulations(self, timesteps: Sequence[float], dtype: torch.dtype) -> list[Modulation]:
        """The modulation of each timestep, in float32 like upstream's.

        Not remembered for later steps: it all comes from one matrix, a hundredth of the model.
        """
        embedder, blocks = self.condition_embedder, list[Any](self.blocks)
        values = pad_rows(upload(torch.tensor(timesteps, dtype=torch.float32), self.scale_shift_table.device))
        sinusoids = embedder.timesteps_proj(values).to(embedder.time_embedder.linear_1.weight.dtype)
        time = embedder.time_embedder(sinusoids).to(dtype)
        projected = linear(embedder.time_proj, F.silu(time)).float().unflatten(1, (1, _FACTORS, -1))
        factors = torch.cat([block.scale_shift_table for block in blocks]) + projected  # [rows, blocks, _FACTORS, dim]
        last = self.scale_shift_table + time[:, None].float()  # [rows, 2, dim]
        factors[:, :, 1::3] += 1
        last[:, 1] += 1
        return [
            Modulation([block.unbind() for block in own], scale, shift, own.nbytes)
            for own, (shift, scale) in zip(factors[: len(timesteps)], last[: len(timesteps)], strict=True)
        ]

    def _layout_of(
        self,
        grids: Sequence[Grid],
        latents: Sequence[torch.Tensor],
        texts: Sequence[torch.Tensor],
        images: Sequence[torch.Tensor] | None,
    ) -> WanLayout:
        device = latents[0].device
        text_lengths = tuple(rows.shape[0] for rows in texts)
        image_lengths = None if images is None else tuple(rows.shape[0] for rows in images)

        def make() -> WanLayout:
            video = PackedRows(tuple(prod(grid) for grid in grids), device)
            return WanLayout(
                video,
                PackedRows(text_lengths, device),
                None if image_lengths is None else PackedRows(image_lengths, device),
                F.pad(torch.cat([self._rotation(one) for one in latents]), [0, 0, 0, 0, 0, video.sizes[-1]]),
            )

        layout: WanLayout = self._layouts.get((tuple(grids), text_lengths, image_lengths, device), make)
        return layout

    def _rotation(self, latents: torch.Tensor) -> torch.Tensor:
        """Complex rotary factors of one video, [tokens, 1, head_dim / 2]: upstream has each twice, side by side."""
        cos, sin = self.rope(latents)
        return torch.complex(cos[0, ..., ::2].float(), sin[0, ..., 1::2].float())

    def _unpatchify(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        """[1, channels, frames, height, width] of one video's tokens."""
        frames, height, width = grid
        patches = rows.view(1, frames, height, width, *self._patch_size, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _parts(timestep: torch.Tensor, tokens: int) -> list[tuple[float, int]]:
    """(timestep, how many tokens) of one video in the order of its tokens."""
    if timestep.dim() == 0:
        return [(float(timestep), tokens)]
    if timestep.numel() != tokens:
        raise ValueError(f"timestep has {timestep.numel()} values for {tokens} tokens: give one, or one per token")
    values, counts = timestep.unique_consecutive(return_counts=True)
    return [*zip(values.tolist(), counts.tolist(), strict=True)]


def _forward_block(
    block: Any,
    video: torch.Tensor,
    text: torch.Tensor,
    image: torch.Tensor | None,
    spans: StreamSpans,
    number: int,
    layout: WanLayout,
) -> None:
    """Block `number` on a window of the video's rows, [rows, dim], which are changed in place."""
    factors = spans.factors(number)
    attended = attend_to_video(block.attn1, modulate(block.norm1, video, factors, 0), layout)
    add_gated(video, attended, factors, 2)
    video += attend_to_conditions(block.attn2, block.norm2(video), text, image, layout)
    add_gated(video, feed_forward(block.ffn, modulate(block.norm3, video, factors, 3), layout.video), factors, 5)
