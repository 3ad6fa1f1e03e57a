"""Which rank does what: homes for new texts, owners of the branches of a step, ranks for side work. Pure.

Keeps what the planner's functions need from one step to the next: who holds which embeddings, and how much side work
each rank was given. Must not import vLLM or torch.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from vllm_cfg_plugin.engine import planner
from vllm_cfg_plugin.engine.plan import DECODED, FORWARDED, PREVIEWED, Decode, Encode, Forward, Preview, SideReport
from vllm_cfg_plugin.engine.planner import Item
from vllm_cfg_plugin.engine.request import ScheduledRequest

# Prompts whose embeddings the ranks' caches probably still hold; if not, a rank encodes again.
_REMEMBERED_PROMPTS = 1024


class Placement:
    """The work of one engine's ranks.

    Args:
        max_side_us: an encode or decode that is predicted to take longer is long.
        processes: that a rank is: all of them encode and forward what it does, and report it; one of them decodes.
        max_tokens: of one rank's forwards in one step.
        max_decode_tokens: of an image that is decoded as a whole.
        encoder_rank: the one rank that has the text encoders; None where all have them.
    """

    def __init__(
        self,
        ranks: int,
        max_side_us: float = math.inf,
        processes: int = 1,
        max_tokens: float = math.inf,
        *,
        max_decode_tokens: float = math.inf,
        encoder_rank: int | None = None,
    ) -> None:
        self._ranks = ranks
        self._max_side_us = max_side_us
        self._processes = processes
        self._max_tokens = max_tokens
        self._max_decode_tokens = max_decode_tokens
        self._encoder_rank = encoder_rank
        self._everywhere = frozenset(range(ranks))
        self._encoded_on: OrderedDict[tuple[str | int, ...], set[int]] = OrderedDict()
        # (id, branch, rank) -> whether it is long, predicted microseconds, reports that are due
        self._side_work: dict[tuple[int, int, int], tuple[bool, int, int]] = {}
        self._backlogs = ([0] * ranks, [0] * ranks)  # predicted microseconds of short and of long side work

    @property
    def has_side_work(self) -> bool:
        """Whether side reports are still to come."""
        return bool(self._side_work)

    def owners_of_newcomer(self, request: ScheduledRequest, loads: Sequence[int]) -> tuple[int, ...]:
        """Ranks for the branches of a request that no rank knows; `loads`: each rank's microseconds per step so far."""
        if len(request.costs) == 1:  # no rank is the usual one for it, so that it need not wait for 5 % of imbalance
            return (min(range(self._ranks), key=lambda rank: (loads[rank], rank)),)
        items = [Item(cost, branch % self._ranks, self._everywhere) for branch, cost in enumerate(request.costs)]
        return tuple(planner.level(items, self._ranks, loads))

    def first_encodes(self, request: ScheduledRequest) -> list[Encode]:
        """Encode each branch's text on its owner, and on ranks that have it cached: there it costs nothing.

        What all ranks must prepare is encoded as a whole, as branch 0.
        """
        if request.spec.on_all_ranks:
            request.asked = [set(self._everywhere) for _ in request.asked]
            return [self._encode(request, 0, rank) for rank in range(self._ranks)]
        encodes = []
        for branch, owner in enumerate(request.owners):
            cached = self._encoded_on.get(request.spec.embeds_key(branch), set()) if self._encoder_rank is None else ()
            encodes += [self._encode(request, branch, rank) for rank in sorted({owner, *cached})]
        return encodes

    def level(
        self, running: Sequence[ScheduledRequest], tick: int, preparing: Iterable[ScheduledRequest] = ()
    ) -> list[Encode]:
        """Even out the ranks' loads: sets `owners`, and returns encodes that will let a later call do better.

        Nothing moves that would give a rank more tokens than it may have, also when all branches are forwarded and
        those who are preparing have joined.

        Args:
            tick: of the step that is being planned; branches that it does not forward keep their owners.
            preparing: who will join.
        """
        slots = [(request, branch) for request in running for branch in range(request.branches_at(tick))]
        items = [
            Item(request.costs[branch], request.owners[branch], frozenset(request.holders[branch]))
            for request, branch in slots
        ]
        owners = planner.level(items, self._ranks)
        _set_owners(slots, owners)
        if max(self._tokens((*running, *preparing))) > self._max_tokens:
            owners = planner.stay(items, self._ranks)
            _set_owners(slots, owners)
        return self._moves(slots, items, owners, tick)

    def _tokens(self, requests: Iterable[ScheduledRequest]) -> list[int]:
        """What each rank forwards when all branches are."""
        tokens = [0] * self._ranks
        for request in requests:
            if not request.is_long:
                tokens = planner.rank_loads(request.branch_tokens, request.owners, self._ranks, tokens)
        return tokens

    def _moves(
        self, slots: Sequence[tuple[ScheduledRequest, int]], items: Sequence[Item], owners: Sequence[int], tick: int
    ) -> list[Encode]:
        if any(request.asked[branch] != request.holders[branch] for request, branch in slots):
            return []  # what was asked for will change what pays
        encode_costs = [request.cost.encode(request.spec.text_tokens[branch]) for request, branch in slots]
        steps_left = [request.alike_left(tick) for request, _ in slots]
        moves = planner.moves_that_pay(items, owners, self._ranks, None, encode_costs, steps_left)
        return [self._encode(*slots[move.index], move.rank) for move in moves]

    def _encode(self, request: ScheduledRequest, branch: int, rank: int) -> Encode:
        """Have a rank encode, or the one with the encoders in its place, which then shares it with the rank."""
        encoder = rank if self._encoder_rank is None else self._encoder_rank
        request.asked[branch] |= {encoder, rank}
        cost = request.encode_cost(branch)
        is_long = cost > self._max_side_us
        self._give(request.id, branch, encoder, is_long, cost)
        if rank != encoder:
            self._give(request.id, branch, rank, is_long, 0)
        return Encode(request.id, branch, encoder, is_long, is_shared=rank != encoder)

    def decode(self, request: ScheduledRequest, loads: Sequence[int]) -> Decode:
        """The decode of a request, on the rank where it is done first; it ends a preview that is not back yet."""
        self._take_back_all(request.id, PREVIEWED)
        rank, is_long = self._give_decode(request, DECODED, loads)
        return Decode(request.id, rank, is_long, self._is_tiled(request))

    def preview(self, request: ScheduledRequest, loads: Sequence[int]) -> Preview:
        """A preview of a request, which is a decode too."""
        request.planned_previews += 1
        rank, is_long = self._give_decode(request, PREVIEWED, loads)
        return Preview(request.id, rank, is_long, self._is_tiled(request))

    def _is_tiled(self, request: ScheduledRequest) -> bool:
        return request.spec.image_tokens > self._max_decode_tokens

    def _give_decode(self, request: ScheduledRequest, kind: int, loads: Sequence[int]) -> tuple[int, bool]:
        """Give a rank something to decode: the rank, and whether it is long."""
        cost = request.cost.decode(request.spec.image_tokens)
        is_long = cost > self._max_side_us
        short, long = self._backlogs
        if is_long:
            backlogs = [sum(both) for both in zip(short, long, strict=True)]
        else:  # it waits for no long work, but shares the core with it
            backlogs = [before + min(beside, before + cost) for before, beside in zip(short, long, strict=True)]
        ranks = self._decoding_ranks
        rank = ranks[planner.choose_side_rank([backlogs[rank] for rank in ranks], [loads[rank] for rank in ranks])]
        self._give(request.id, kind, rank, is_long, cost)
        return rank, is_long

    @property
    def _decoding_ranks(self) -> list[int]:
        """Those with room for it: the one with the encoders has less."""
        return [rank for rank in range(self._ranks) if rank != self._encoder_rank] or [0]

    def forward(self, request: ScheduledRequest) -> Forward:
        """The forwards of a long request's next step; there may be none."""
        owners = request.long_owners
        request.forwarding = set(owners)
        for rank, cost in enumerate(planner.rank_loads(request.costs[: len(owners)], owners, self._ranks)):
            if rank in request.forwarding:
                self._give(request.id, FORWARDED, rank, True, cost)
        return Forward(request.id, owners)

    def note_done(self, report: SideReport) -> bool:
        """Note a report; whether the work is done: not while other processes of the rank are still at it."""
        key = report.id, report.branch, report.rank
        is_long, microseconds, due = self._side_work.get(key, (False, 0, 1))
        if due > 1 and not report.error:
            self._side_work[key] = is_long, microseconds, due - 1
            return False
        self._take_back(*key)
        return True

    def note_encoded(self, report: SideReport, request: ScheduledRequest) -> None:
        """A rank holds the text of a branch, or all of a request that every rank prepares."""
        if request.spec.on_all_ranks:
            for holders in request.holders:
                holders.add(report.rank)
            return
        request.holders[report.branch].add(report.rank)
        key = request.spec.embeds_key(report.branch)
        self._encoded_on.setdefault(key, set()).add(report.rank)
        self._encoded_on.move_to_end(key)
        if len(self._encoded_on) > _REMEMBERED_PROMPTS:
            self._encoded_on.popitem(last=False)

    def forget(self, request: ScheduledRequest) -> None:
        """A request left: what it still had queued at the ranks is cancelled there, and no report of it is awaited."""
        self._take_back_all(request.id)

    def _give(self, id: int, branch: int, rank: int, is_long: bool, microseconds: int) -> None:
        reports = 1 if branch in (DECODED, PREVIEWED) else self._processes
        self._side_work[id, branch, rank] = is_long, microseconds, reports
        self._backlogs[is_long][rank] += microseconds

    def _take_back_all(self, id: int, branch: int | None = None) -> None:
        for key in [key for key in self._side_work if key[0] == id and branch in (None, key[1])]:
            self._take_back(*key)

    def _take_back(self, id: int, branch: int, rank: int) -> None:
        is_long, microseconds, _ = self._side_work.pop((id, branch, rank), (False, 0, 0))
        self._backlogs[is_long][rank] -= microseconds


def _set_owners(slots: Iterable[tuple[ScheduledRequest, int]], owners: Iterable[int]) -> None:
    for (request, branch), owner in zip(slots, owners, strict=True):
        if owner != request.owners[branch]:
            request.owners = (*request.owners[:branch], owner, *request.owners[branch + 1 :])
