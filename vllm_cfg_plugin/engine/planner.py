"""Branch forwards to ranks, so that the slowest rank of a step is done as early as possible; pure functions.

Must not import torch or vLLM. Every branch of a running request is forwarded by one rank per step, and may be by any
that holds its text embeddings. `level` says by which, `moves_that_pay` where more embeddings would help, and
`choose_side_rank` places the work that any rank can do. `levelling.py` says how the levelling is done, and after whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_cfg_plugin.engine.levelling import Levelling, is_near, lower_bound, rank_loads

__all__ = ["Item", "Move", "choose_side_rank", "level", "moves_that_pay", "rank_loads", "stay"]


@dataclass(frozen=True, slots=True)
class Item:
    """One branch forward of one step.

    Attributes:
        cost: predicted microseconds of one forward.
        owner: rank that forwards it now; for a newcomer its default rank, branch number % ranks.
        allowed: ranks that may own it, those that hold its text embeddings; all ranks if it is still to be encoded.
    """

    cost: int
    owner: int
    allowed: frozenset[int]


@dataclass(frozen=True, slots=True)
class Move:
    """Encode item `index` on `rank` too, so that later steps may forward it there."""

    index: int
    rank: int


def level(items: Sequence[Item], ranks: int, base: Sequence[int] | None = None) -> list[int]:
    """Owners of all items so that the heaviest rank's load is (nearly) least.

    Nothing moves while the heaviest load is within 5 % of a lower bound, nor unless a change lowers it. Levelling again
    from the owners that it returned changes nothing.
    """
    levelling = Levelling([item.cost for item in items], [item.allowed for item in items], ranks, base)
    return levelling.level([item.owner for item in items])


def stay(items: Sequence[Item], ranks: int) -> list[int]:
    """Keep all owners; move only the items whose rank may not own them."""
    return Levelling([item.cost for item in items], [item.allowed for item in items], ranks).permitted(
        [item.owner for item in items]
    )


def moves_that_pay(
    items: Sequence[Item],
    owners: Sequence[int],
    ranks: int,
    base: Sequence[int] | None,
    encode_cost: Sequence[int],
    steps_left: Sequence[int],
) -> list[Move]:
    """Encodes that let `level` lower the makespan by more than they cost over the steps that are left.

    At most one for each rank; ask again when they are done. They pay together: what one step gains, times the fewest
    steps that any of the moved items has left, is more than all these encodes.

    Args:
        owners: what `level` returned for the items.
        encode_cost, steps_left: of each item: microseconds of encoding it once more, and steps after this one.
    """
    draft = _MoveDraft(items, owners, ranks, base, encode_cost, steps_left)
    moves = draft.best_prefix()
    if not moves:
        return []
    allowed = [item.allowed for item in items]
    for move in moves:
        allowed[move.index] |= {move.rank}
    levelling = Levelling([item.cost for item in items], allowed, ranks, base)
    after = levelling.makespan(levelling.level(owners))
    return moves if draft.net_gain(moves, after) > 0 else []


def choose_side_rank(backlogs: Sequence[int], loads: Sequence[int]) -> int:
    """The rank for work that any rank can do, such as a decode: least backlog of such work plus load, then lowest."""
    return min(range(len(loads)), key=lambda rank: (backlogs[rank] + loads[rank], rank))


class _MoveDraft:
    """Moves tried out one after the other on the loads of one step."""

    def __init__(
        self,
        items: Sequence[Item],
        owners: Sequence[int],
        ranks: int,
        base: Sequence[int] | None,
        encode_cost: Sequence[int],
        steps_left: Sequence[int],
    ) -> None:
        self._items = items
        self._owners = list(owners)
        self._encode_cost = encode_cost
        self._steps_left = steps_left
        self._costs = costs = [item.cost for item in items]
        self._loads = rank_loads(costs, owners, ranks, base)
        self._before = tuple(self._loads)
        self._bound = lower_bound(sorted(costs, reverse=True), base if base is not None else [0] * ranks)

    def net_gain(self, moves: Sequence[Move], makespan: int) -> int:
        """Microseconds that `moves` gain over the steps that are left by this makespan, less those of their encodes."""
        steps = min(self._steps_left[move.index] for move in moves)
        return (max(self._before) - makespan) * steps - sum(self._encode_cost[move.index] for move in moves)

    def best_prefix(self) -> list[Move]:
        """The moves with the best net gain among 'the first', 'the first two', ...; empty if none gains."""
        moves: list[Move] = []
        best: list[Move] = []
        best_gain = 0
        for _ in range(8 * len(self._loads)):
            if is_near(max(self._loads), self._bound):
                break
            heavy = self._loads.index(max(self._loads))
            moved = {move.index for move in moves}
            candidates = [i for i, owner in enumerate(self._owners) if owner == heavy and i not in moved]
            if self._move_for_free(candidates, heavy):
                continue
            move = self._best_move(candidates, heavy, {move.rank for move in moves})
            if move is None:
                break
            self._apply(move)
            moves.append(move)
            gain = self.net_gain(moves, max(self._loads))
            if gain > best_gain:
                best, best_gain = list(moves), gain
        return best

    def _apply(self, move: Move) -> None:
        cost = self._costs[move.index]
        self._loads[self._owners[move.index]] -= cost
        self._loads[move.rank] += cost
        self._owners[move.index] = move.rank

    def _move_for_free(self, candidates: list[int], heavy: int) -> bool:
        """Move what needs no encode first: `level` leaves it where it is while another rank is as heavy."""
        costs, loads = self._costs, self._loads
        choices = [
            (max(loads[heavy] - costs[i], loads[rank] + costs[i]), i, rank)
            for i in candidates
            for rank in self._items[i].allowed
            if loads[rank] + costs[i] < loads[heavy]
        ]
        if choices:
            _, i, rank = min(choices)
            self._apply(Move(i, rank))
        return bool(choices)

    def _best_move(self, candidates: list[int], heavy: int, given: set[int]) -> Move | None:
        """The move off `heavy` to the lightest rank not given one yet, with the best net gain of these two ranks."""
        costs, loads = self._costs, self._loads
        light = min((r for r in range(len(loads)) if r not in given), key=lambda r: (loads[r], r), default=heavy)
        best, best_gain = None, 0
        for i in candidates:
            if light in self._items[i].allowed or self._has_other_rank(i):
                continue
            lower = loads[heavy] - max(loads[heavy] - costs[i], loads[light] + costs[i])
            gain = lower * self._steps_left[i] - self._encode_cost[i]
            if gain > best_gain:
                best, best_gain = Move(i, light), gain
        return best

    def _has_other_rank(self, i: int) -> bool:
        """Whether `level` can take the item off its rank without an encode."""
        allowed, heaviest = self._items[i].allowed, max(self._before)
        return len(allowed) > 1 and any(
            rank != self._owners[i] and self._before[rank] + self._costs[i] < heaviest for rank in allowed
        )
