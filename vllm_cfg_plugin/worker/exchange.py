"""The one collective of a step: every rank's predictions and failure flags to all ranks.

Each rank sends one flat row, laid out as all ranks know from the plan: its predictions end to end in plan order, zeros
to the longest rank's length, then one flag per request. A rank that computed nothing still sends its row, so no rank
ever waits for one that failed. Must not import vLLM or torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_cfg_plugin.engine.plan import Forward

# [row] -> [ranks, row]
AllGather = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Slot:
    """Where one branch's prediction lies: row `rank`, from `offset`."""

    index: int  # of the request in the plan
    branch: int
    rank: int
    offset: int
    size: int


@dataclass(frozen=True)
class ExchangeLayout:
    """The layout of one step's rows."""

    slots: tuple[Slot, ...]
    width: int  # elements of predictions in a row
    requests: int

    @classmethod
    def of(cls, forwards: Sequence[Forward], sizes: Sequence[int], ranks: int) -> ExchangeLayout:
        """`sizes`: elements of one prediction of each request."""
        ends = [0] * ranks
        slots = []
        for index, (forward, size) in enumerate(zip(forwards, sizes, strict=True)):
            for branch, rank in enumerate(forward.owners):
                slots.append(Slot(index, branch, rank, ends[rank], size))
                ends[rank] += size
        return cls(tuple(slots), max(ends), len(forwards))


def exchange_predictions(
    layout: ExchangeLayout,
    rank: int,
    mine: Mapping[tuple[int, int], torch.Tensor],
    failed: Sequence[bool],
    shapes: Sequence[tuple[int, int]],
    like: torch.Tensor,
    all_gather: AllGather,
) -> tuple[list[list[torch.Tensor]], list[bool]]:
    """Exchange this rank's predictions.

    Args:
        mine: (request index, branch) -> prediction [1, image_tokens, channels] of this rank's slots; a missing one is
            zeros.
        failed: per request, whether this rank can't go on with it.
        shapes: (image_tokens, channels) per request.
        like: any tensor of the predictions' dtype and device.

    Returns:
        Per request its branches' predictions in branch order, and whether any rank failed it: the same on every rank.
    """
    row = like.new_zeros(layout.width + layout.requests)
    for slot in layout.slots:
        prediction = mine.get((slot.index, slot.branch)) if slot.rank == rank else None
        if prediction is not None:
            row[slot.offset : slot.offset + slot.size] = prediction.reshape(-1)
    row[layout.width :] = torch.tensor(failed, dtype=row.dtype)
    rows = all_gather(row)
    predictions: list[list[torch.Tensor]] = [[] for _ in range(layout.requests)]
    for slot in layout.slots:
        flat = rows[slot.rank, slot.offset : slot.offset + slot.size]
        predictions[slot.index].append(flat.view(1, *shapes[slot.index]))
    return predictions, (rows[:, layout.width :] != 0).any(dim=0).tolist()
