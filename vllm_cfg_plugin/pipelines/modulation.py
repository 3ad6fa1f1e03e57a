"""Qwen-Image's modulation by the timestep alone, computed ahead and remembered; must not import vLLM.

A third of the transformer's weights turn a timestep into scales, shifts and gates: the same for every sequence at that
timestep. A matrix product is padded to `ROW_MULTIPLE` rows anyway, so a request's following timesteps take the
padding's place, and its next steps read no modulation weight at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

from vllm_cfg_plugin.pipelines.linear import linear
from vllm_cfg_plugin.worker.packing import ROW_MULTIPLE, pad_rows

# Timesteps kept: as many as fit in these bytes, but for a large model at least this many (each 4.4 MB in
# Qwen-Image).
_CACHE_BYTES = 32 * 2**20
_MIN_TIMESTEPS = 64

Factors = tuple[torch.Tensor, ...]

_PER_BLOCK = 12  # (shift, scale, gate) of attention, then of the MLP; of the image, then of the text
_SCALES = slice(1, None, 3)


@dataclass(frozen=True)
class Modulation:
    """What one timestep does to the activations; each factor is [dim], and scales have their one already added.

    Attributes:
        blocks: for each block (shift, scale, gate) of the image's attention and MLP, then of the text's.
        scale, shift: after the last block.
        nbytes: of all of it.
    """

    blocks: list[Factors]
    scale: torch.Tensor
    shift: torch.Tensor
    nbytes: int


class ModulationCache:
    """Least recently used modulations of one model whose weights do not change."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[float, torch.dtype], Modulation] = OrderedDict()

    def get(self, model: Any, timesteps: Sequence[float], ahead: torch.Tensor, dtype: torch.dtype) -> list[Modulation]:
        """The modulation of each timestep; where one is missing, `ahead` fills the rows that would be padding."""
        missing = [t for t in dict.fromkeys(timesteps) if (t, dtype) not in self._entries]
        if missing:
            later = (t for t in dict.fromkeys(ahead.tolist()) if (t, dtype) not in self._entries and t not in missing)
            batch = [*missing, *islice(later, -len(missing) % ROW_MULTIPLE)]
            # Those needed now go in last, so that they stay.
            for t, modulation in reversed([*zip(batch, compute_modulations(model, batch, dtype), strict=True)]):
                self._entries[t, dtype] = modulation
        found = []
        for t in timesteps:
            self._entries.move_to_end((t, dtype))
            found.append(self._entries[t, dtype])
        self._evict()
        return found

    def clear(self) -> None:
        """To be called when weights or adapters change."""
        self._entries.clear()

    def _evict(self) -> None:
        size = max((entry.nbytes for entry in self._entries.values()), default=1)
        limit = max(_CACHE_BYTES // size, _MIN_TIMESTEPS)
        while len(self._entries) > limit:
            self._entries.popitem(last=False)


def compute_modulations(model: Any, timesteps: Sequence[float], dtype: torch.dtype) -> list[Modulation]:
    """The modulation of each timestep (in 0..1) by a QwenImageTransformer2DModel; the same bits in any company."""
    weight = model.img_in.weight
    values = torch.tensor(timesteps, dtype=dtype, device=weight.device)
    time = F.silu(model.time_text_embed(pad_rows(values), weight))
    rows = []
    for block in model.transformer_blocks:
        rows += [linear(block.img_mod[1], time), linear(block.txt_mod[1], time)]
    rows.append(linear(model.norm_out.linear, time))  # scale, shift
    modulations = []
    for row in torch.cat(rows, dim=1)[: len(timesteps)]:
        factors = row.clone().view(-1, weight.shape[0])
        factors[:-2][_SCALES] += 1
        factors[-2] += 1
        *views, scale, shift = factors.unbind()
        blocks = [tuple(views[i : i + _PER_BLOCK]) for i in range(0, len(views), _PER_BLOCK)]
        modulations.append(Modulation(blocks, scale, shift, factors.nbytes))
    return modulations
