"""The exchange's layout: every rank reads the same predictions and the same failures out of all ranks' rows."""

import torch

from vllm_cfg_plugin.worker.exchange import ExchangeLayout, exchange_predictions

SHAPES = [(4, 2), (3, 2), (5, 2)]
OWNERS = [(0, 1), (1,), (0, 1)]


def run(ranks, predictions, failed_by_rank):
    """Every rank's view, with the collective played by computing all rows first."""
    layout = ExchangeLayout.of(OWNERS, SHAPES, ranks)
    rows: list[torch.Tensor] = []
    views = []
    for gather in (lambda row: rows.append(row) or torch.zeros(ranks, len(row)), lambda row: torch.stack(rows)):
        views = [
            exchange_predictions(
                layout,
                rank,
                {slot: p for slot, p in predictions.items() if OWNERS[slot[0]][slot[1]] == rank},
                failed_by_rank[rank],
                torch.empty(0),
                gather,
            )
            for rank in range(ranks)
        ]
    return views


def make_predictions():
    return {(i, b): torch.randn(1, *SHAPES[i]) for i, owners in enumerate(OWNERS) for b in range(len(owners))}


def test_rows_have_no_gaps_and_the_longest_ranks_length():
    """Rows have no gaps and are as long as the longest rank needs."""
    layout = ExchangeLayout.of(OWNERS, SHAPES, ranks=2)
    spans = {
        rank: [(cell.offset, cell.offset + cell.size) for cell in layout.cells if cell.rank == rank] for rank in (0, 1)
    }
    assert spans == {0: [(0, 8), (8, 18)], 1: [(0, 8), (8, 14), (14, 24)]}
    assert layout.width == 24


def test_every_rank_sees_every_prediction():
    predictions = make_predictions()
    for gathered, failed in run(2, predictions, [[False] * 3] * 2):
        assert failed.tolist() == [False] * 3
        for index, owners in enumerate(OWNERS):
            assert len(gathered[index]) == len(owners)
            for branch, prediction in enumerate(gathered[index]):
                assert torch.equal(prediction, predictions[index, branch])


def test_a_failure_on_one_rank_is_known_on_all():
    """A failure on one rank is known on all and touches nobody else."""
    predictions = make_predictions()
    del predictions[0, 1]
    for gathered, failed in run(2, predictions, [[False] * 3, [True, False, False]]):
        assert failed.tolist() == [True, False, False]
        assert torch.equal(gathered[0][1], torch.zeros(1, *SHAPES[0]))
        assert torch.equal(gathered[2][1], predictions[2, 1])
