"""Where Z-Image's packed sequences lie; must not import vLLM.

Every image and every text is filled up to a multiple of 32 rows with pad tokens, as diffusers does with a request
alone: they are part of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZImageTransformer2DModel

from vllm_cfg_plugin.pipelines.common.packing import PackedRows
from vllm_cfg_plugin.pipelines.common.upload import upload

Grid = tuple[int, int, int]  # (frames, height, width) in tokens
_Place = tuple[torch.Tensor, torch.Tensor]  # of each row: complex rotary factors, whether it is a pad token

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PaddedStream:
    """Sequences with their pad tokens, and the complex rotary factors of all rows, [rows, 1, head_dim / 2]."""

    rows: PackedRows
    rotation: torch.Tensor


@dataclass(frozen=True)
class ZImageLayout:
    """The streams of the packed sequences.

    Attributes:
        image, text: before they are joined.
        joint: image then text of sequence 0, of sequence 1, ...
        image_pads, text_pads: which rows of this rank's windows of the two streams are pad tokens.
    """

    image: PaddedStream
    text: PaddedStream
    joint: PaddedStream
    image_pads: torch.Tensor
    text_pads: torch.Tensor

    def image_of(self, stream: torch.Tensor) -> torch.Tensor:
        """This rank's window of the image stream out of that of the joint one."""
        image, joint = self.image.rows, self.joint.rows
        sequences = zip(joint.split(joint.gather(stream)), image.lengths, strict=True)
        return image.window(image.join(rows[:length] for rows, length in sequences))


def make_layout(
    model: ZImageTransformer2DModel, grids: tuple[Grid, ...], text_lengths: tuple[int, ...], device: torch.device
) -> ZImageLayout:
    """The layout of sequences of such images and so many text tokens."""
    images, texts = [], []
    for grid, text_length in zip(grids, text_lengths, strict=True):
        # A text counts on over its pad tokens, and the image's frames after these; its pad tokens are at zero.
        text_rows = text_length + -text_length % SEQ_MULTI_OF
        images.append(_place(model, prod(grid), grid, text_rows + 1))
        texts.append(_place(model, text_length, (text_rows, 1, 1), 1))
    image = _make_stream([[place] for place in images], device)
    text = _make_stream([[place] for place in texts], device)
    return ZImageLayout(
        image=image,
        text=text,
        joint=_make_stream([*zip(images, texts, strict=True)], device),
        image_pads=upload(_pads_of(images, image.rows), device),
        text_pads=upload(_pads_of(texts, text.rows), device),
    )


def lay_out(sequences: Sequence[torch.Tensor], rows: PackedRows) -> torch.Tensor:
    """A stream of sequences [tokens, ...], with zeros where they have pad tokens."""
    pads = (x.new_zeros(length - len(x), x.shape[1]) for x, length in zip(sequences, rows.lengths, strict=True))
    return rows.join(piece for pair in zip(sequences, pads, strict=True) for piece in pair)


def _place(model: ZImageTransformer2DModel, tokens: int, grid: Grid, first: int) -> _Place:
    """Where diffusers puts so many tokens, and the pad tokens behind them."""
    _, positions, is_pad, rows, _ = model._pad_with_ids(torch.empty(tokens, 0), grid, (first, 0, 0), _CPU)
    return model.rope_embedder(positions[:rows]), is_pad


def _make_stream(sequences: Sequence[Sequence[_Place]], device: torch.device) -> PaddedStream:
    """The stream of sequences, each of one or more parts."""
    rotations = [[rotation for rotation, _ in parts] for parts in sequences]
    rows = PackedRows(tuple(sum(map(len, parts)) for parts in rotations), device)
    return PaddedStream(rows, upload(rows.join(part for parts in rotations for part in parts)[:, None], device))


def _pads_of(places: Sequence[_Place], rows: PackedRows) -> torch.Tensor:
    return rows.window(rows.join(is_pad for _, is_pad in places)).nonzero().flatten()
