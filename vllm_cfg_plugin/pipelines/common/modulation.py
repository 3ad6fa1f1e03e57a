"""Scales, shifts and gates of packed sequences (adaptive layer norm); must not import vLLM.

Where a model is modulated by the timestep alone, as Qwen-Image is, a third of its weights do nothing else: the result
is the same for every sequence at that timestep, so it is computed ahead and remembered. A matrix product is padded to
`ROW_MULTIPLE` rows anyway: a request's following timesteps take the padding's place, and its next steps read no
modulation weight at all. What adapters change of it is computed and remembered apart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F

from vllm_cfg_plugin.distributed.sequence_group import SequenceGroup, current_group, is_own_group
from vllm_cfg_plugin.pipelines.adapters import carrying, current_pack, name_of_modulating
from vllm_cfg_plugin.pipelines.common import fused
from vllm_cfg_plugin.pipelines.common.packing import ROW_MULTIPLE, PackedRows
from vllm_cfg_plugin.pipelines.common.tensor_parallel import project
from vllm_cfg_plugin.pipelines.common.upload import upload

# Timesteps kept: as many as fit in these bytes, but for a large model at least this many (each 4.4 MB in
# Qwen-Image).
_CACHE_BYTES = 32 * 2**20
_MIN_TIMESTEPS = 64

Factors = tuple[torch.Tensor, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Modulation:
    """What one condition does to the activations; each factor is [dim], and scales have their one already added.

    Attributes:
        blocks: for each block (shift, scale, gate) of the image's attention and MLP, then of the text's; or what else
            its layers give, see `project_modulations`.
        scale, shift: after the last block.
        nbytes: of all of it.
    """

    blocks: list[Factors]
    scale: torch.Tensor
    shift: torch.Tensor
    nbytes: int


class TimestepModulated(Protocol):
    """A packed model that nothing but the timestep modulates."""

    modulations: ModulationCache

    def compute_modulations(self, timesteps: Sequence[float], dtype: torch.dtype) -> list[Modulation]:
        """The modulation of each timestep, as the model's forward is given it, bitwise independent of the others."""


class ModulationCache:
    """LRU cache of the modulations of one model whose weights do not change; safe for threads.

    A deep copy is a new, empty cache: that of a model whose copy may change.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[float, torch.dtype, Hashable], Modulation] = OrderedDict()
        self._lock = Lock()
        self._failures = 0  # of a group that computes modulations together

    def get(
        self, model: TimestepModulated, timesteps: Sequence[float], ahead: torch.Tensor, dtype: torch.dtype
    ) -> list[Modulation]:
        """The modulation of each timestep; where one is missing, `ahead` fills the rows that would be padding."""
        self._stay_alike(current_group())
        distinct, rest = dict.fromkeys(timesteps), (dtype, name_of_modulating())
        with self._lock:
            found = {t: entry for t in distinct if (entry := self._entries.get((t, *rest))) is not None}
            missing = [t for t in distinct if t not in found]
            later = (t for t in dict.fromkeys(ahead.tolist()) if (t, *rest) not in self._entries and t not in missing)
            rows = [*missing, *islice(later, -len(missing) % ROW_MULTIPLE)]
        # Outside the lock, so that no thread waits for one of lower priority.
        computed = dict(zip(rows, model.compute_modulations(rows, dtype), strict=True)) if rows else {}
        found |= {t: computed[t] for t in missing}
        with self._lock:
            for t in rows[len(missing) :]:
                self._entries[t, *rest] = computed[t]
            # Those needed now go in last, so that they stay.
            for t in distinct:
                self._entries[t, *rest] = found[t]
                self._entries.move_to_end((t, *rest))
            self._evict()
        return [found[t] for t in timesteps]

    def clear(self) -> None:
        """To be called when weights or adapters change."""
        with self._lock:
            self._entries.clear()

    def _stay_alike(self, group: SequenceGroup) -> None:
        """Ranks that compute modulations together must miss the same: after a failure one may have what others lack."""
        if group.tensor.size > 1 and group.failures != self._failures:
            self._failures = group.failures
            self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def _evict(self) -> None:
        size = max((entry.nbytes for entry in self._entries.values()), default=1)
        limit = max(_CACHE_BYTES // size, _MIN_TIMESTEPS)
        while len(self._entries) > limit:
            self._entries.popitem(last=False)


def modulations_at(
    model: TimestepModulated, timestep: torch.Tensor, timesteps_ahead: torch.Tensor | None, dtype: torch.dtype
) -> list[Modulation]:
    """The modulation of each timestep [n]: one object for equal timesteps.

    Args:
        timesteps_ahead: timesteps of later calls, [any number], which are modulated on the side; None where weights may
            change between calls: then nothing is remembered.
    """
    timesteps, group = timestep.to(dtype).tolist(), current_group()
    # Ranks that compute them together forward on two threads, and these would find one thing on one rank and another
    # on the next: so what is not in the steps is not remembered.
    is_remembered = group.tensor.size == 1 or is_own_group(group)

    def at(numbers: Sequence[int]) -> list[Modulation]:
        own = [timesteps[number] for number in numbers]
        if timesteps_ahead is not None and is_remembered:
            return model.modulations.get(model, own, timesteps_ahead.to(dtype), dtype)
        distinct = list(dict.fromkeys(own))
        of_timestep = dict(zip(distinct, model.compute_modulations(distinct, dtype), strict=True))
        return [of_timestep[t] for t in own]

    return by_modulation(len(timesteps), at)


def by_modulation(count: int, compute: Callable[[Sequence[int]], Sequence[T]]) -> list[T]:
    """What is computed of `count` conditions, those of all sequences once or several times over.

    Args:
        compute: called with the numbers of conditions, of sequences with the same modulating adapters; it returns one
            result for each.
    """
    pack = current_pack()
    if pack is None or not pack.modulates:
        return [*compute(range(count))]
    results: dict[int, T] = {}
    for carried, numbers in pack.by_modulation(count):
        with carrying([carried]):
            results |= zip(numbers, compute(numbers), strict=True)
    return [results[number] for number in range(count)]


def some_rows(tensor: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """The rows of these numbers; without an index tensor, whose copy to a GPU would be waited for."""
    return tensor if len(numbers) == tensor.shape[0] else torch.stack([tensor[number] for number in numbers])


def project_modulations(
    layers: Iterable[Sequence[Any]], last: Any, condition: torch.Tensor, count: int
) -> list[Modulation]:
    """The modulations that a model's linear layers make of conditions.

    Args:
        layers: of each block. A layer gives (shift, scale, gate), any number of times, or (scale, shift), which is
            stored the other way round.
        last: the layer that gives (scale, shift) after the last block.
        condition: what the layers take, [rows, dim]: padded to `ROW_MULTIPLE` rows.
        count: rows that are no padding.
    """
    lengths: list[int] = []

    def in_turn() -> Iterator[Any]:
        for block in layers:
            lengths.append(len(block))
            yield from block
        yield last

    *projected, final = project(in_turn(), condition)
    dim, of_layers = final.shape[1] // 2, iter(projected)
    blocks = [torch.cat([_factors_of(own, dim) for own in islice(of_layers, length)], dim=1) for length in lengths]
    rows = torch.cat([*blocks, _factors_of(final, dim)], dim=1)  # [rows, factors, dim]
    sizes = [block.shape[1] for block in blocks]
    modulations = []
    for row in rows[:count]:
        factors = row.clone()
        *of_blocks, (shift, scale) = (part.unbind() for part in factors.split([*sizes, 2]))
        modulations.append(Modulation(of_blocks, scale, shift, factors.nbytes))
    return modulations


def _factors_of(projected: torch.Tensor, dim: int) -> torch.Tensor:
    """[rows, factors, dim] of one layer's output, scales with their one added and in second place."""
    factors = projected.unflatten(1, (-1, dim))
    if factors.shape[1] == 2:
        factors = factors.flip(1)
    factors[:, 1::3] += 1
    return factors


class StreamSpans(NamedTuple):
    """Neighbouring rows of one stream that share a modulation.

    Attributes:
        modulations, rows: of each span.
        row_spans: number of each row's span, where rows are worked on one by one (`fused.py`); None where spans are.
    """

    modulations: list[Modulation]
    rows: list[slice]
    row_spans: torch.Tensor | None = None

    @classmethod
    def of(cls, modulations: Sequence[Modulation], stream: PackedRows) -> Self:
        """The spans of this rank's window of a stream whose parts have these modulations, one per part."""
        firsts = [i for i, own in enumerate(modulations) if i == 0 or own is not modulations[i - 1]]
        return cls([modulations[i] for i in firsts], stream.cut(firsts)).window(stream)

    def window(self, stream: PackedRows) -> Self:
        """The spans of this rank's window of the stream."""
        spans = zip(self.modulations, map(stream.window_of, self.rows), strict=True)
        kept = [(modulation, rows) for modulation, rows in spans if rows.start < rows.stop]
        own = [rows for _, rows in kept]
        return type(self)([modulation for modulation, _ in kept], own, _row_spans(own, stream.device))

    def factors(self, number: int) -> SpanFactors:
        """Each span's factors of block `number`."""
        return SpanFactors.of(self.rows, [modulation.blocks[number] for modulation in self.modulations], self.row_spans)


def _row_spans(spans: Sequence[slice], device: torch.device) -> torch.Tensor | None:
    """Number of each row's span, where that is of use."""
    if len(spans) < 2 or not fused.is_enabled(device):
        return None
    return _spans_of_rows(tuple(span.stop - span.start for span in spans), device)


@lru_cache(64)
def _spans_of_rows(counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """0 as often as the first count says, and so on: the same in all steps of the same requests."""
    return upload(torch.repeat_interleave(torch.tensor(counts)), device)


@dataclass(frozen=True)
class SpanFactors:
    """What a block's layers do to the spans of a stream.

    Attributes:
        rows: of each span.
        factors: of each span, [dim] each.
        row_spans: see `StreamSpans`; with it `table` has the factors of all spans, [spans, factors, dim].
    """

    rows: Sequence[slice]
    factors: Sequence[Factors]
    row_spans: torch.Tensor | None = None
    table: torch.Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[slice], factors: Sequence[Factors], row_spans: torch.Tensor | None = None) -> Self:
        if row_spans is None:
            return cls(rows, factors)
        table = torch.stack([factor for own in factors for factor in own]).unflatten(0, (len(factors), -1))
        return cls(rows, factors, row_spans, table)


def modulate(norm: Any, stream: torch.Tensor, spans: SpanFactors, shift: int) -> torch.Tensor:
    """The layer norm of each span's rows, with the span's own scale and shift (factors `shift + 1` and `shift`).

    It is computed in the factors' dtype, which may be wider than the stream's.
    """
    if (table := spans.table) is not None:
        modulate_rows = fused.compiled(fused.modulate_rows)
        return modulate_rows(stream, table[:, shift + 1], table[:, shift], spans.row_spans, norm.eps)
    pieces = [
        F.layer_norm(stream[span].to(own[shift].dtype), norm.normalized_shape, own[shift + 1], own[shift], norm.eps)
        for span, own in zip(spans.rows, spans.factors, strict=True)
    ]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(stream.dtype)


def modulate_last(norm: Any, stream: torch.Tensor, spans: StreamSpans) -> torch.Tensor:
    """The stream after the last block, [rows, dim], normalised for the output projection."""
    factors = [(modulation.shift, modulation.scale) for modulation in spans.modulations]
    return modulate(norm, stream, SpanFactors.of(spans.rows, factors, spans.row_spans), 0)


def add_gated(stream: torch.Tensor, change: torch.Tensor, spans: SpanFactors, gate: int) -> None:
    """Add a change to the stream in place, weighed by each span's own gate (factor `gate`)."""
    if spans.table is not None:
        fused.compiled(fused.add_gated_rows)(stream, change, spans.table[:, gate], spans.row_spans)
        return
    for span, own in zip(spans.rows, spans.factors, strict=True):
        stream[span].addcmul_(change[span], own[gate])
