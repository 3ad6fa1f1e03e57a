"""Sequences laid end to end: lengths, padding, windows and runs; must import neither vLLM nor diffusers.

A packed stream holds the rows of n sequences one after the other, then padding rows that belong to none, up to some
multiple of `ROW_MULTIPLE`. On a CPU with one thread per rank, this is what makes a sequence's numbers independent of
its neighbours: a matrix product gives a row the same bits for every row count from 16 up (measured with torch 2.13,
float32, MKL and oneDNN), and an elementwise loop over whole vectors never falls into the scalar tail whose `exp` or
`tanh` may round otherwise.

Where processes share a forward by its rows, a stream is as many windows of equal size as there are ranks, and between
attentions each of them holds one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F

from vllm_cfg_plugin.distributed.sequence_group import Peers, current_group
from vllm_cfg_plugin.pipelines.common.tensor_cache import TensorCache
from vllm_cfg_plugin.pipelines.common.upload import upload

ROW_MULTIPLE = 16
# torch's elementwise loops take two vectors of up to 16 floats at a time. So many rows of any width are whole ones:
# where the streams of one rank have no scalar tail, no window has one.
WINDOW_MULTIPLE = 32

# Layouts of a model that are kept: they serve every step of the requests that run together. 131,072 rows of a head of
# 128 channels, so many requests of any lengths; and a layout that is too large for it costs little beside its forward.
_LAYOUT_CACHE_BYTES = 64 * 2**20


def padding_rows(rows: int) -> int:
    """Rows to append to `rows` rows, to the next of 16 sizes in every octave; a stream is never empty.

    Few sizes, because oneDNN makes a kernel for each that is new (milliseconds a model) and keeps a bounded number; at
    most a sixteenth of the rows is padding where there are more than 256.
    """
    if rows == 0:
        return ROW_MULTIPLE
    return -rows % max(ROW_MULTIPLE, 1 << max(0, (rows - 1).bit_length() - 5))


def pad_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, ...] with as many zero rows appended as `padding_rows` says."""
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
        group: the ranks that share the stream.
    """

    lengths: tuple[int, ...]
    device: torch.device
    group: Peers = field(default_factory=lambda: current_group().sequence)

    @cached_property
    def total(self) -> int:
        """Rows that belong to sequences."""
        return sum(self.lengths)

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each sequence, then those of the padding."""
        return [*self.lengths, self.group.size * self.window_size - self.total]

    @cached_property
    def window_size(self) -> int:
        """Rows that one rank holds."""
        if self.group.size == 1:
            return self.total + padding_rows(self.total)
        rows = -(-self.total // self.group.size)
        rows += padding_rows(rows)
        return rows + -rows % WINDOW_MULTIPLE

    @cached_property
    def window_rows(self) -> slice:
        """The rows that this rank holds; none, some or all of them may be padding."""
        return slice(self.group.rank * self.window_size, (self.group.rank + 1) * self.window_size)

    @cached_property
    def starts(self) -> list[int]:
        """First row of each sequence, then the end of the last."""
        return [0, *accumulate(self.lengths)]

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """First row of each sequence and the end of the last: int32 [n + 1], as varlen attention kernels take it."""
        return upload(torch.tensor(self.starts, dtype=torch.int32), self.device)

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest sequence."""
        return max(self.lengths)

    def split(self, stream: torch.Tensor) -> list[torch.Tensor]:
        """Views of the sequences in a stream [rows, ...], without the padding."""
        return list(torch.split(stream[: self.total], self.sizes[:-1]))

    def join(self, sequences: Iterable[torch.Tensor]) -> torch.Tensor:
        """A new padded stream from the sequences' rows, each [length, ...]."""
        pieces = list(sequences)
        if self.sizes[-1]:
            pieces.append(pieces[0].new_zeros(self.sizes[-1], *pieces[0].shape[1:]))
        return torch.cat(pieces)

    def cut(self, firsts: Sequence[int]) -> list[slice]:
        """The rows from each of the sequences `firsts` up to the next one's; the last end with the padding."""
        starts = [self.starts[first] for first in firsts]
        return [slice(start, end) for start, end in zip(starts, [*starts[1:], None], strict=True)]

    def window(self, stream: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a stream [rows, ...], filled up with zeros where its padding is missing."""
        own = stream[self.window_rows]
        missing = self.window_size - own.shape[0]
        return F.pad(own, [0, 0] * (own.dim() - 1) + [0, missing]) if missing else own

    def window_of(self, rows: slice) -> slice:
        """Where rows of the stream lie in this rank's window; empty if they don't."""
        first, last = self.window_rows.start, self.window_rows.stop
        stop = last if rows.stop is None else min(rows.stop, last)
        return slice(max(rows.start or 0, first) - first, max(stop - first, 0))

    def gather(self, window: torch.Tensor) -> torch.Tensor:
        """The whole padded stream from every rank's window [rows, ...]."""
        return self.group.all_gather(window)


class LayoutCache(TensorCache[Any]):
    """A model's layouts by what they depend on, and by the ranks that share the forward."""

    def __init__(self, capacity_bytes: int = _LAYOUT_CACHE_BYTES) -> None:
        super().__init__(capacity_bytes)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        return super().get((current_group(), key), make)


@lru_cache(256)
def common_runs(*layouts: PackedRows) -> tuple[tuple[Run, ...], ...]:
    """The sequences of some streams in maximal runs of equal lengths in each; of every run its `Run` in each stream."""
    runs = []
    sequence, rows = 0, [0] * len(layouts)
    for lengths, group in groupby(zip(*(layout.lengths for layout in layouts), strict=True)):
        count = len(list(group))
        sequences = slice(sequence, sequence + count)
        ends = [row + count * length for row, length in zip(rows, lengths, strict=True)]
        spans = [slice(row, end) for row, end in zip(rows, ends, strict=True)]
        runs.append(tuple(Run(sequences, span, count, length) for span, length in zip(spans, lengths, strict=True)))
        sequence, rows = sequence + count, ends
    return tuple(runs)


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
