"""Work items to ranks: pure functions, no vLLM, no torch.

Every branch of a request is forwarded by one rank per step. When the branches divide evenly over the ranks each rank
takes its fixed share (with two ranks: positive on 0, negative on 1); what is left over, such as the single branch of a
request without guidance, goes to the rank with the fewest tokens, so no rank idles and none computes what another one
does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BranchLoad:
    """A running request as the planner sees it: tokens of each branch's sequence, and which rank owns each branch."""

    id: int
    tokens: tuple[int, ...]
    owners: tuple[int, ...]


def rank_loads(requests: Iterable[BranchLoad], ranks: int) -> list[int]:
    """Tokens that each rank forwards in one step."""
    loads = [0] * ranks
    for request in requests:
        for tokens, owner in zip(request.tokens, request.owners, strict=True):
            loads[owner] += tokens
    return loads


def assign_owners(tokens: Sequence[int], loads: Sequence[int]) -> tuple[int, ...]:
    """Owners of a joining request's branches, given the tokens that each rank already forwards."""
    ranks = len(loads)
    fixed = _fixed_branches(len(tokens), ranks)
    owners = [branch % ranks for branch in range(fixed)]
    loads = list(loads)
    for branch, owner in enumerate(owners):
        loads[owner] += tokens[branch]
    taken: set[int] = set()
    for branch in range(fixed, len(tokens)):
        owner = min((r for r in range(ranks) if r not in taken), key=lambda r: (loads[r], r))
        taken.add(owner)
        loads[owner] += tokens[branch]
        owners.append(owner)
    return tuple(owners)


def rebalance(requests: Sequence[BranchLoad], ranks: int) -> dict[int, tuple[int, ...]]:
    """New owners of requests that should move because others left; empty when no move lowers the heaviest rank's load.

    A move costs the new owner one text encoding (none if its cache holds the prompt), so only leftover branches move,
    and only for a strictly lighter heaviest rank.
    """
    owners = {request.id: request.owners for request in requests}
    loads = rank_loads(requests, ranks)
    while True:
        heavy = max(range(ranks), key=lambda r: (loads[r], -r))
        light = min(range(ranks), key=lambda r: (loads[r], r))
        move = _best_move(requests, owners, ranks, heavy, light, loads[heavy] - loads[light])
        if move is None:
            break
        request, branch = move
        moved = list(owners[request.id])
        moved[branch] = light
        owners[request.id] = tuple(moved)
        loads[heavy] -= request.tokens[branch]
        loads[light] += request.tokens[branch]
    return {request.id: owners[request.id] for request in requests if owners[request.id] != request.owners}


def choose_decode_rank(loads: Sequence[int], decodes_so_far: Sequence[int]) -> int:
    """The rank that decodes next: the one with least to do in this step, then the one that decoded least."""
    return min(range(len(loads)), key=lambda r: (loads[r], decodes_so_far[r], r))


def _fixed_branches(branches: int, ranks: int) -> int:
    return branches // ranks * ranks


def _best_move(
    requests: Sequence[BranchLoad],
    owners: dict[int, tuple[int, ...]],
    ranks: int,
    heavy: int,
    light: int,
    gap: int,
) -> tuple[BranchLoad, int] | None:
    """The leftover branch on `heavy` that evens out the gap best; must be smaller than the gap to help at all."""
    best: tuple[BranchLoad, int] | None = None
    for request in requests:
        current = owners[request.id]
        for branch in range(_fixed_branches(len(current), ranks), len(current)):
            if current[branch] != heavy or light in current or request.tokens[branch] >= gap:
                continue
            if best is None or abs(2 * request.tokens[branch] - gap) < abs(2 * best[0].tokens[best[1]] - gap):
                best = (request, branch)
    return best
