"""A group of ranks that share a model's weights, of which one is real and the others are played."""

import torch
import torch.nn.functional as F

from vllm_cfg_plugin.distributed.sequence_group import ALONE


class Played:
    """Rank `rank` of `size`, for what one process can look at.

    Args:
        terms: what each rank would send; without them all send what this one does.
    """

    is_stoppable, trades, failures, sequence = True, 0, 0, ALONE

    def __init__(self, rank, size, terms=None):
        self.rank, self.size, self._terms, self._sums = rank, size, terms, None
        self.tensor = self

    def all_gather(self, rows):
        if self._sums is not None:  # the second half of a sum
            assert torch.equal(rows, self._sums.chunk(self.size)[self.rank])
            return self._sums
        return torch.cat(self._terms or [rows] * self.size)

    def all_to_all(self, parts):
        padding = -self._terms[0].shape[0] % self.size
        padded = [F.pad(term, [0, 0, 0, padding]) for term in self._terms]
        self._sums = padded[0]
        for term in padded[1:]:
            self._sums = self._sums + term
        assert torch.equal(parts, padded[self.rank].unflatten(0, (self.size, -1)))
        return torch.stack([term.chunk(self.size)[self.rank] for term in padded])

    def any(self, flags):
        return [*flags]

    def fail(self):
        """Nobody has to be told."""
