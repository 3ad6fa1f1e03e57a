"""Sequences laid end to end: lengths, boundaries and row arithmetic; must import nothing but torch.

A packed stream holds the rows of n sequences one after the other, then padding rows that belong to none, up to a
multiple of `ROW_MULTIPLE`. On a CPU with one thread per rank, this is what makes a sequence's numbers independent of
its neighbours: a matrix product gives a row the same bits for every row count from 16 up (measured with torch 2.13,
float32), and an elementwise loop over whole vectors never falls into the scalar tail whose `exp` or `tanh` may round
otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F

ROW_MULTIPLE = 16

# Below so many numbers per run, gathering every row's factors costs less than one operation per run (measured, CPU).
_GATHER_BELOW = 1 << 15


def padding_rows(rows: int) -> int:
    """Rows to append to `rows` rows; a stream is never empty."""
    return -rows % ROW_MULTIPLE if rows else ROW_MULTIPLE


def pad_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, ...] with zero rows appended up to a multiple of `ROW_MULTIPLE`."""
    padding = padding_rows(tensor.shape[0])
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, padding]) if padding else tensor


@dataclass(frozen=True)
class Run:
    """Neighbouring sequences of one length: they form a regular [count, length, ...] block.

    Attributes:
        sequences: which sequences.
        rows: which rows of the stream.
        count, length: number of sequences, rows of each.
    """

    sequences: slice
    rows: slice
    count: int
    length: int

    def block(self, stream: torch.Tensor) -> torch.Tensor:
        """View of this run in a stream [rows, ...]: [count, length, ...]."""
        return stream[self.rows].view(self.count, self.length, *stream.shape[1:])


@dataclass(frozen=True)
class PackedRows:
    """Layout of one packed stream.

    Attributes:
        lengths: rows of each sequence, in order.
        device: where the index tensors live.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def total(self) -> int:
        """Rows that belong to sequences."""
        return sum(self.lengths)

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each sequence, then those of the padding."""
        return [*self.lengths, padding_rows(self.total)]

    @cached_property
    def runs(self) -> list[Run]:
        """The sequences in maximal runs of equal length."""
        runs: list[Run] = []
        sequence = row = 0
        for length, group in groupby(self.lengths):
            count = len(list(group))
            end = row + count * length
            runs.append(Run(slice(sequence, sequence + count), slice(row, end), count, length))
            sequence, row = sequence + count, end
        return runs

    @cached_property
    def boundaries(self) -> torch.Tensor:
        """First row of each sequence and the end of the last: int32 [n + 1], as varlen attention kernels take it."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def sequence_of_row(self) -> torch.Tensor:
        """For every row its sequence, for padding the last one: [rows]."""
        rows = torch.tensor(self.sizes, device=self.device)
        sequences = torch.arange(len(self.sizes), device=self.device).repeat_interleave(rows)
        return sequences.clamp_(max=len(self.lengths) - 1)

    def split(self, stream: torch.Tensor) -> list[torch.Tensor]:
        """Views of the sequences in a stream [rows, ...], without the padding."""
        return list(torch.split(stream[: self.total], self.sizes[:-1]))

    def join(self, sequences: Iterable[torch.Tensor]) -> torch.Tensor:
        """A new padded stream from the sequences' rows, each [length, ...]."""
        pieces = list(sequences)
        if self.sizes[-1]:
            pieces.append(pieces[0].new_zeros(self.sizes[-1], *pieces[0].shape[1:]))
        return torch.cat(pieces)

    def scale_(self, stream: torch.Tensor, factors: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply every row of each sequence by its own factors, then add its own offsets, in place.

        Two roundings, like the two operations it stands for: the result does not depend on the way it is computed.

        Args:
            stream: [rows, channels]; what becomes of padding rows is undefined.
            factors, offsets: one row per sequence, [>= n, channels].
        """
        if len(self.runs) > 1 and stream.numel() < len(self.runs) * _GATHER_BELOW:
            stream.mul_(factors.index_select(0, self.sequence_of_row))
            return stream if offsets is None else stream.add_(offsets.index_select(0, self.sequence_of_row))
        for run in self.runs:
            block = run.block(stream)
            block.mul_(factors[run.sequences, None])
            if offsets is not None:
                block.add_(offsets[run.sequences, None])
        return stream


def interleave(first: PackedRows, second: PackedRows, streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join two streams sequence by sequence: rows of sequence 0 in the first, then in the second, then sequence 1, ...

    The padding rows of both come last.

    Args:
        streams: pairs of a stream laid out as `first` and one laid out as `second`, flat; every pair has rows of one
            shape.

    Returns:
        [pairs, rows, ...]
    """
    pieces: list[torch.Tensor] = []
    for stream, other in zip(streams[::2], streams[1::2], strict=True):
        for pair in zip(torch.split(stream, first.sizes), torch.split(other, second.sizes), strict=True):
            pieces.extend(pair)
    return torch.cat(pieces).view(len(streams) // 2, -1, *streams[0].shape[1:])
