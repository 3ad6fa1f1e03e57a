"""The one collective of a step: every rank's predictions and failure flags to all ranks.

Each rank sends one flat row, laid out as all ranks know from the plan: its predictions end to end in the requests'
order, zeros to the longest rank's length, then one flag per request. A rank that computed nothing still sends its row,
so no rank ever waits for one that failed. Must not import vLLM or torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from vllm_cfg_plugin.pipelines.common.upload import upload

# [row] -> [ranks, row]
AllGather = Callable[[torch.Tensor], torch.Tensor]

Slot = tuple[int, int]  # (position of the request, branch)


@dataclass(frozen=True)
class Cell:
    """Where one branch's prediction lies: row `rank`, from `offset`."""

    slot: Slot
    rank: int
    offset: int
    size: int


@dataclass(frozen=True)
class ExchangeLayout:
    """The layout of the rows, the same for all steps of the same requests with the same owners.

    Attributes:
        width: elements of predictions in a row.
        shapes: of each request's predictions, without their leading 1.
    """

    cells: tuple[Cell, ...]
    width: int
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, owners: Sequence[tuple[int, ...]], shapes: Sequence[tuple[int, ...]], ranks: int) -> ExchangeLayout:
        """The layout for requests of these prediction shapes; `owners`: of each request, each branch's rank."""
        ends = [0] * ranks
        cells = []
        for position, (branch_owners, shape) in enumerate(zip(owners, shapes, strict=True)):
            size = prod(shape)
            for branch, rank in enumerate(branch_owners):
                cells.append(Cell((position, branch), rank, ends[rank], size))
                ends[rank] += size
        return cls(tuple(cells), max(ends), tuple(shapes))


def exchange_predictions(
    layout: ExchangeLayout,
    rank: int,
    mine: Mapping[Slot, torch.Tensor],
    failed: Sequence[bool],
    like: torch.Tensor,
    all_gather: AllGather,
) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    """Exchange this rank's predictions.

    Args:
        mine: prediction [1, ...] of each slot of this rank; a missing one is zeros.
        failed: per request, whether this rank can't go on with it.
        like: any tensor of the predictions' dtype and device.

    Returns:
        Per request its branches' predictions in branch order, and whether any rank failed it, bool [requests] where the
        predictions are: the same on every rank.
    """
    rows = all_gather(_row(layout, rank, mine, failed, like))
    predictions: list[list[torch.Tensor]] = [[] for _ in layout.shapes]
    for cell in layout.cells:
        position, _ = cell.slot
        flat = rows[cell.rank, cell.offset : cell.offset + cell.size]
        predictions[position].append(flat.view(1, *layout.shapes[position]))
    return predictions, (rows[:, layout.width :] != 0).any(dim=0)


def _row(
    layout: ExchangeLayout, rank: int, mine: Mapping[Slot, torch.Tensor], failed: Sequence[bool], like: torch.Tensor
) -> torch.Tensor:
    """What a rank sends."""
    own = [cell for cell in layout.cells if cell.rank == rank]
    pieces = []
    for cell in own:
        prediction = mine.get(cell.slot)
        pieces.append(like.new_zeros(cell.size) if prediction is None else prediction.reshape(-1).to(like.dtype))
    pieces.append(like.new_zeros(layout.width - sum(cell.size for cell in own) + len(failed)))
    row = torch.cat(pieces)
    if any(failed):
        row[layout.width :] = upload(torch.tensor(failed, dtype=row.dtype), row.device)
    return row
