"""Levelling: which rank does which item so that the heaviest rank has least to do; lists of integers, nothing else.

Must not import torch or vLLM. Scheduling on identical machines with a set of allowed machines per job. Longest
processing time first is R. L. Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17 (1969); the
bound from the number of items that some rank must take is M. Dell'Amico and S. Martello, "Optimal Scheduling of Tasks
on Identical Parallel Processors", ORSA J. Computing 7 (1995).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate


def rank_loads(costs: Iterable[int], owners: Iterable[int], ranks: int, base: Sequence[int] | None = None) -> list[int]:
    """Microseconds of work that each rank has in one step; `base` is what it has besides the items."""
    loads = list(base) if base is not None else [0] * ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return loads


def is_near(makespan: int, bound: int) -> bool:
    return 20 * makespan <= 21 * bound


def water_level(heights: Iterable[int], work: int) -> int:
    """Least possible load of the heaviest rank if `work` could be split at will over ranks with these loads."""
    rising = sorted(heights)
    surface = min(-(-(work + below) // wet) for wet, below in enumerate(accumulate(rising), 1))
    return max(surface, rising[-1])


def counting_bound(longest_first: Sequence[int], ranks: int) -> int:
    """Of the k * ranks + 1 longest items some rank gets k + 1, at least the k + 1 shortest of them."""
    sums = [0, *accumulate(longest_first[: 20 * ranks + 1])]
    return max((sums[last] - sums[last - last // ranks - 1] for last in range(1, len(sums), ranks)), default=0)


def lower_bound(longest_first: Sequence[int], base: Sequence[int]) -> int:
    """No assignment of items of these costs to ranks that already have `base` has a lighter heaviest rank than this."""
    counted = counting_bound(longest_first, len(base)) + min(base)
    return max(counted, water_level(base, sum(longest_first)))


class Levelling:
    """One step's items: their costs and the ranks that may own them. Owners are lists of ranks, one for each item."""

    def __init__(
        self, costs: list[int], allowed: list[frozenset[int]], ranks: int, base: Sequence[int] | None = None
    ) -> None:
        self._costs = costs
        self._allowed = allowed
        self._ranks = ranks
        self._base = list(base) if base is not None else [0] * ranks
        self._order: list[int] = []  # longest first; made when something has to move

    def loads(self, owners: Sequence[int]) -> list[int]:
        return rank_loads(self._costs, owners, self._ranks, self._base)

    def makespan(self, owners: Sequence[int]) -> int:
        return max(self.loads(owners))

    def level(self, owners: Sequence[int]) -> list[int]:
        """Owners with a (nearly) least makespan, starting from these."""
        best = self.permitted(owners)
        while True:
            loads = self.loads(best)
            if is_near(max(loads), -(-sum(loads) // self._ranks)):  # by far the quickest bound
                return best
            bound = self._bound(best, loads)
            if is_near(max(loads), bound):
                return best
            better = self._improve(best, bound)
            if self.makespan(better) >= max(loads):
                return best
            best = better

    def permitted(self, owners: Sequence[int]) -> list[int]:
        """The same owners, but an item whose rank may not own it goes to the least loaded rank that may."""
        owners, costs, allowed = list(owners), self._costs, self._allowed
        strays = [i for i, owner in enumerate(owners) if owner not in allowed[i]]
        if not strays:
            return owners
        loads = self.loads(owners)
        for i in strays:
            if not allowed[i]:
                raise ValueError(f"allowed of item {i} is empty: no rank could forward it; encode it on one first")
            loads[owners[i]] -= costs[i]
        for i in sorted(strays, key=lambda i: -costs[i]):
            owners[i] = min(allowed[i], key=lambda rank: (loads[rank], rank))
            loads[owners[i]] += costs[i]
        return owners

    def _improve(self, owners: list[int], bound: int) -> list[int]:
        """Better owners, or the same if none are found: few changes first, then all items afresh."""
        best = owners
        for target in (bound, 0):
            candidate = self._spread(best, target)
            if self.makespan(candidate) < self.makespan(best):
                best = candidate
            if is_near(self.makespan(best), bound):
                break
        return best

    def _bound(self, owners: Sequence[int], loads: Sequence[int]) -> int:
        """A lower bound on the heaviest rank's load, whatever the assignment.

        Items that may only be on some ranks have to be shared by these. Looked at are the ranks that work of the
        heaviest one can move to, directly or by moving other work on, and the set of all ranks.
        """
        if not self._order:
            self._order = sorted(range(len(self._costs)), key=self._costs.__getitem__, reverse=True)
        base = self._base
        bound = lower_bound([self._costs[i] for i in self._order], base)
        closed = self._reachable(owners, loads.index(max(loads)))
        if len(closed) < self._ranks:
            inside = [base[rank] for rank in closed]
            bound = max(bound, water_level(inside, sum(loads[rank] for rank in closed) - sum(inside)))
        return bound

    def _reachable(self, owners: Sequence[int], start: int) -> frozenset[int]:
        """Ranks where work of rank `start` could go, also by pushing other ranks' work on."""
        reached, grown = frozenset((start,)), True
        while grown:
            grown = False
            for owner, allowed in zip(owners, self._allowed, strict=True):
                if owner in reached and not allowed <= reached:
                    reached |= allowed
                    grown = True
                    if len(reached) == self._ranks:
                        return reached
        return reached

    def _spread(self, owners: Sequence[int], target: int) -> list[int]:
        """Take from each rank above `target` the longest items that fit its excess, and place them by Graham's rule."""
        owners, costs, allowed, ranks = list(owners), self._costs, self._allowed, self._ranks
        excess = [load - target for load in self.loads(owners)]
        taken = []
        for i in self._order:
            cost, owner = costs[i], owners[i]
            if cost <= excess[owner] and len(allowed[i]) > 1:
                excess[owner] -= cost
                taken.append(i)
        # One integer holds a load and its rank, so that min() finds the lowest of the least loaded ranks.
        keys = [load * ranks + rank for rank, load in enumerate(excess)]
        key_of = keys.__getitem__
        for i in taken:
            key = min(keys) if len(allowed[i]) == ranks else min(map(key_of, allowed[i]))
            owners[i] = rank = key % ranks
            keys[rank] += costs[i] * ranks
        return owners
