"""Levelling: which rank does which item so that the heaviest rank has least to do; lists of integers, nothing else.

Must not import torch or vLLM. Scheduling on identical machines with a set of allowed machines per job. Longest
processing time first is R. L. Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17 (1969); the
bound from the number of items that some rank must take is M. Dell'Amico and S. Martello, "Optimal Scheduling of Tasks
on Identical Parallel Processors", ORSA J. Computing 7 (1995).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

_SWAP_ITEMS = 64  # more items than this level well without swaps, and trying all pairs of them would take too long
_SEARCH_ITEMS = 16  # at most so many items that have a choice are searched exactly
_SEARCH_NODES = 500  # of one search, at about 2 us each; 7 items on 4 ranks were never seen to need 330


def rank_loads(costs: Iterable[int], owners: Iterable[int], ranks: int, base: Sequence[int] | None = None) -> list[int]:
    """Microseconds of work that each rank has in one step; `base` is what it has besides the items."""
    loads = list(base) if base is not None else [0] * ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return loads


def is_near(makespan: int, bound: int) -> bool:
    return 20 * makespan <= 21 * bound


def water_level(heights: Iterable[int], work: int) -> int:
    """Load of the heaviest rank if `work` could be poured like water over ranks that are already so full."""
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
        best = self._permitted(owners)
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

    def _permitted(self, owners: Sequence[int]) -> list[int]:
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
        """Better owners, or the same if none are found: few changes first, then afresh, then by search."""
        best = owners
        for target in (bound, 0):
            candidate = self._spread(best, target)
            if self.makespan(candidate) >= self.makespan(best):
                candidate = list(best)
            self._refine(candidate, bound)
            if self.makespan(candidate) < self.makespan(best):
                best = candidate
            if is_near(self.makespan(best), bound):
                return best
        return self._search(best, bound)

    def _bound(self, owners: Sequence[int], loads: Sequence[int]) -> int:
        """No assignment has a lighter heaviest rank than this.

        The items of a set of ranks that lead nowhere else have to stay in it. The set looked at is what can be reached
        from the heaviest rank; the set of all ranks is the other one.
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

    def _refine(self, owners: list[int], bound: int) -> None:
        """Move an item from the heaviest rank to a lighter one, or swap two, as long as that helps both."""
        loads = self.loads(owners)
        for _ in range(len(owners)):
            if is_near(max(loads), bound):
                return
            heavy = loads.index(max(loads))
            change = self._best_change(owners, loads, heavy)
            if change is None:
                return
            i, rank, back = change
            owners[i] = rank
            if back >= 0:
                owners[back] = heavy
            difference = self._costs[i] - (self._costs[back] if back >= 0 else 0)
            loads[heavy] -= difference
            loads[rank] += difference

    def _best_change(self, owners: Sequence[int], loads: Sequence[int], heavy: int) -> tuple[int, int, int] | None:
        """The item to move off `heavy`, its new rank and the item that comes back for it (-1: none)."""
        costs, allowed = self._costs, self._allowed
        back: list[list[int]] = [[-1] for _ in range(self._ranks)]
        if len(owners) <= _SWAP_ITEMS:
            for j, owner in enumerate(owners):
                if heavy in allowed[j]:
                    back[owner].append(j)
        best, change = loads[heavy], None
        for i, owner in enumerate(owners):
            if owner != heavy:
                continue
            for rank in sorted(allowed[i] - {heavy}):
                for j in back[rank]:
                    difference = costs[i] - (costs[j] if j >= 0 else 0)
                    heavier = max(loads[heavy] - difference, loads[rank] + difference)
                    if heavier < best:
                        best, change = heavier, (i, rank, j)
        return change

    def _search(self, owners: list[int], bound: int) -> list[int]:
        """Owners within 5 % of the best, unless there are too many items or the search runs out of nodes."""
        order = [i for i in self._order if len(self._allowed[i]) > 1]
        if len(order) > _SEARCH_ITEMS:
            return owners
        nodes = _SEARCH_NODES
        makespan = self.makespan(owners)
        while not is_near(makespan, bound):
            # If nothing fits under this limit the best is above it, and the present makespan within 5 % of the best.
            found, nodes = self._fit(owners, order, (20 * makespan - 1) // 21, nodes)
            if found is None:
                break
            owners, makespan = found, self.makespan(found)
        return owners

    def _fit(self, owners: Sequence[int], order: list[int], limit: int, nodes: int) -> tuple[list[int] | None, int]:
        """Owners whose loads are all at most `limit`, by branch and bound, and the nodes that are left of `nodes`."""
        placed = list(owners)
        free = [limit - load for load in self.loads(owners)]
        for i in order:
            free[owners[i]] += self._costs[i]
        if min(free) < 0:
            return None, nodes
        costs = [self._costs[i] for i in order]
        # Where an item stays is tried before other ranks with the same room.
        options = [[owners[i], *sorted(self._allowed[i] - {owners[i]})] for i in order]
        # Ranks with the same room are alike for the search if the same items may go there.
        kinds = [tuple(rank in self._allowed[i] for i in order) for rank in range(self._ranks)]
        kind = [kinds.index(kinds[rank]) for rank in range(self._ranks)]

        def place(depth: int, work: int) -> bool:
            nonlocal nodes
            if depth == len(order):
                return True
            nodes -= 1
            if nodes < 0 or sum([room for room in free if room >= costs[-1]]) < work:
                return False
            cost, tried = costs[depth], set()
            for rank in sorted(options[depth], key=free.__getitem__):
                room = free[rank]
                if room < cost or (room, kind[rank]) in tried:
                    continue
                tried.add((room, kind[rank]))
                placed[order[depth]] = rank
                free[rank] = room - cost
                if place(depth + 1, work - cost):
                    return True
                free[rank] = room
            return False

        return (placed if place(0, sum(costs)) else None), max(nodes, 0)
