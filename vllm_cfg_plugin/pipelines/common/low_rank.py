"""The low-rank products that adapters add to the rows of their own sequences; must not import vLLM.

Products are of whole blocks of `ROW_MULTIPLE` rows, of which those of other sequences are left out, and the rank is
padded when an adapter is loaded: so a row gets the same bits wherever its sequence lies. Plain torch, two products for
each adapter and layer; a GPU takes them one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vllm_cfg_plugin.pipelines.adapters import LowRank, Pack, current_pack
from vllm_cfg_plugin.pipelines.common.packing import ROW_MULTIPLE, PackedRows

Additions = Sequence[tuple[LowRank, float]]  # with the scale of each


@dataclass(frozen=True)
class Part:
    """Neighbouring rows of a window.

    Attributes:
        window: the whole blocks of rows that they lie in.
        inner: where they lie in these.
    """

    window: slice
    inner: slice

    @classmethod
    def of(cls, rows: slice, count: int) -> Part:
        """The part of a window of `count` rows."""
        first = rows.start // ROW_MULTIPLE * ROW_MULTIPLE
        last = min(-(-rows.stop // ROW_MULTIPLE) * ROW_MULTIPLE, count)
        return cls(slice(first, last), slice(rows.start - first, rows.stop - first))


@dataclass(frozen=True)
class AdaptedSpans:
    """The rows of a window to which adapters add something, in order, and what."""

    spans: Sequence[tuple[slice, Additions]]

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Add it to a layer's output, [rows, outputs], in place.

        Args:
            x: the layer's input, [rows, channels].
        """
        for rows, additions in self.spans:
            part = Part.of(rows, x.shape[0])
            window, own = x[part.window], output[part.window]
            for low_rank, scale in additions:
                inner = F.linear(window, low_rank.down).mul_(scale)
                inner[: part.inner.start] = 0
                inner[part.inner.stop :] = 0
                own.addmm_(inner, low_rank.up.t())

    def parts(self, x: torch.Tensor) -> Iterator[tuple[Part, AdaptedSpans | None]]:
        """All rows of x in order: those that are adapted, with their spans inside of the part's window, and others."""
        count, done = x.shape[0], 0
        for stretch in self._stretches():
            start, stop = stretch[0][0].start, stretch[-1][0].stop
            if start > done:
                yield Part.of(slice(done, start), count), None
            part = Part.of(slice(start, stop), count)
            moved = [(_moved(rows, -part.window.start), additions) for rows, additions in stretch]
            yield part, AdaptedSpans(moved)
            done = stop
        if done < count:
            yield Part.of(slice(done, count), count), None

    def _stretches(self) -> Iterator[list[tuple[slice, Additions]]]:
        """The spans, those together that follow each other without a row between."""
        stretch: list[tuple[slice, Additions]] = []
        for span in self.spans:
            if stretch and stretch[-1][0].stop != span[0].start:
                yield stretch
                stretch = []
            stretch.append(span)
        yield stretch


def adapted_spans(module: Any, x: torch.Tensor, rows: PackedRows | None) -> AdaptedSpans | None:
    """What adapters add to a layer's product; None where they add nothing.

    Args:
        x: the window of a stream.
        rows: of that stream; None where all of it belongs to sequences that carry the same.

    Raises:
        RuntimeError: these carry different adapters.
    """
    pack = current_pack()
    if pack is None:
        return None
    additions = pack.at(module)
    if not any(additions):
        return None
    if rows is None:
        if any(own != pack.carried[0] for own in pack.carried):
            raise RuntimeError(f"a {type(module).__name__} is adapted for some sequences, and its rows are not told")
        return AdaptedSpans([(slice(0, x.shape[0]), additions[0])])
    firsts = _first_of_equals(pack)
    windows = zip(firsts, map(rows.window_of, rows.cut(firsts)), strict=True)
    spans = [(window, additions[first]) for first, window in windows if additions[first] and window.start < window.stop]
    return AdaptedSpans(spans) if spans else None


def _first_of_equals(pack: Pack) -> list[int]:
    """The first of each run of sequences that carry the same."""
    return [i for i, own in enumerate(pack.carried) if i == 0 or own != pack.carried[i - 1]]


def _moved(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)
