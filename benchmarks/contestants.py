"""Ways to use the same ranks, all on the engine's own batching code, and the traffic that they are given.

`StepBatch` takes another placement or another waiting line where a contestant differs from us; ranks, encodes, decodes
and limits per rank are the same for all. Must not import vLLM.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from benchmarks.virtual_engine import Served, VirtualEngine
from benchmarks.virtual_ranks import Overheads, VirtualRanks
from vllm_cfg_plugin.engine.admission import WaitingLine
from vllm_cfg_plugin.engine.batching import StepBatch
from vllm_cfg_plugin.engine.cost import CostModel
from vllm_cfg_plugin.engine.placement import Placement
from vllm_cfg_plugin.engine.plan import Encode
from vllm_cfg_plugin.engine.request import ScheduledRequest
from vllm_cfg_plugin.params import DiffusionRequest, Guidance

SIDES = (64, 128, 192, 256)  # pixels
HUGE_SIDE = 512
STEPS = (4, 8, 12, 20, 30)
PIXELS_OF_TOKEN = 8  # a side of the bundled model's
TEXT_TOKENS = (8, 12, 20)
NEGATIVE_TOKENS = 6
SCALE = 4.0


@dataclass(frozen=True)
class Machine:
    """What every contestant runs on.

    Attributes:
        max_requests, max_tokens, max_step_us: limits per rank: requests known, and tokens and microseconds in one step.
    """

    ranks: int
    cost: CostModel
    overheads: Overheads
    max_requests: int
    max_tokens: int
    max_step_us: float = 1e6


class FixedPlacement(Placement):
    """Branch b belongs to rank b, always."""

    def owners_of_newcomer(self, request: ScheduledRequest, loads: Sequence[int]) -> tuple[int, ...]:
        return tuple(range(len(request.costs)))

    def level(
        self, running: Sequence[ScheduledRequest], tick: int, preparing: Iterable[ScheduledRequest] = ()
    ) -> list[Encode]:
        return []


# Whether a request may join those who were in before this plan, and those who join with it.
MayJoin = Callable[[ScheduledRequest, Sequence[ScheduledRequest], Sequence[ScheduledRequest]], bool]


class StrictLine(WaitingLine):
    """First come first served, nobody is overtaken."""

    def __init__(self, batch: StepBatch, may_join: MayJoin) -> None:
        super().__init__()
        self._batch = batch
        self._may_join = may_join

    def take(self, try_to_join: Callable[[ScheduledRequest], bool]) -> Iterator[ScheduledRequest]:
        before = [*self._batch.stepping]
        joining: list[ScheduledRequest] = []
        for request in self.in_order():
            if not self._may_join(request, before, joining) or not try_to_join(request):
                return
            self.remove(request)
            joining.append(request)
            yield request


def _has_their_shape(
    request: ScheduledRequest, before: Sequence[ScheduledRequest], joining: Sequence[ScheduledRequest]
) -> bool:
    others = before or joining
    return not others or _shape(others[0].spec) == _shape(request.spec)


def _finds_nobody(
    request: ScheduledRequest, before: Sequence[ScheduledRequest], joining: Sequence[ScheduledRequest]
) -> bool:
    return not before


def _shape(spec: DiffusionRequest) -> Hashable:
    return spec.height, spec.width, spec.num_inference_steps, spec.guidance.scale, spec.guided


class FixedPairs(StepBatch):
    """Rank 0 forwards positive, rank 1 negative branches."""

    placement_class = FixedPlacement


class FirstCome(StepBatch):
    """Who came first goes first, and not who is done first."""

    def add(self, *args: Any) -> ScheduledRequest:
        request = super().add(*args)
        request.work = 0  # all are equally long
        return request


class EqualShapes(StepBatch):
    """Only requests of one shape run together."""

    def __init__(self, *args: Any, **limits: Any) -> None:
        super().__init__(*args, **limits)
        self.waiting = StrictLine(self, _has_their_shape)


class WholeRequests(StepBatch):
    """Nobody joins while somebody runs."""

    def __init__(self, *args: Any, **limits: Any) -> None:
        super().__init__(*args, **limits)
        self.waiting = StrictLine(self, _finds_nobody)


@dataclass(frozen=True)
class Contestant:
    """A way to use the ranks.

    Attributes:
        ranks: of each engine; 0: one engine has them all.
        both_forward: also the second rank forwards the branch of a request without guidance.
    """

    name: str
    ranks: int
    batch: type[StepBatch] = StepBatch
    both_forward: bool = False

    def engines(self, machine: Machine) -> list[VirtualEngine]:
        ranks = self.ranks or machine.ranks

        def make_batch(clock: Callable[[], float]) -> StepBatch:
            return self.batch(
                ranks,
                machine.max_requests * ranks,
                machine.max_tokens,
                machine.cost,
                clock,
                max_step_us=machine.max_step_us,
                max_side_us=machine.max_step_us,
            )

        return [
            VirtualEngine(make_batch, VirtualRanks(ranks, machine.cost, machine.overheads), machine.overheads.engine_us)
            for _ in range(machine.ranks // ranks)
        ]

    def adapt(self, spec: DiffusionRequest) -> DiffusionRequest:
        if spec.guided or not self.both_forward:
            return spec
        return msgspec.structs.replace(spec, prompts=spec.prompts * 2, text_tokens=spec.text_tokens * 2)


RIVALS = (
    Contestant("DP replicas", 1),
    Contestant("fixed pairs", 2, FixedPairs, both_forward=True),
    Contestant("equal shapes", 1, EqualShapes),
    Contestant("whole requests", 1, WholeRequests),
)


def contestants(ranks: int) -> list[Contestant]:
    """All that differ on so many ranks."""
    replicas = [Contestant(f"ours, replicas of {size}", size) for size in (2, 4, 8) if size < ranks]
    return [Contestant("ours", 0), Contestant("ours, first come first", 0, FirstCome), *replicas, *RIVALS]


@dataclass(frozen=True)
class Arrival:
    """A request that comes at a time, in microseconds."""

    at: float
    spec: DiffusionRequest


def serve(contestant: Contestant, machine: Machine, trace: Sequence[Arrival]) -> list[Served]:
    """Play a trace to its end; each request goes to the engine with the fewest unanswered ones."""
    engines = contestant.engines(machine)
    for number, arrival in enumerate(trace):
        for engine in engines:
            engine.run_until(arrival.at)
        least = min(engines, key=lambda engine: engine.outstanding(arrival.at))
        least.submit(arrival.at, str(number), contestant.adapt(arrival.spec))
    for engine in engines:
        engine.run_until(math.inf)
    return [served for engine in engines for served in engine.served]


def request(side: int, steps: int, guided: bool, text_tokens: int = TEXT_TOKENS[0], name: str = "") -> DiffusionRequest:
    """A request of the bundled model; no prompt but the negative one is used twice if names differ."""
    return DiffusionRequest(
        prompts=[f"prompt {name}", *([" "] if guided else [])],
        text_tokens=[text_tokens, *([NEGATIVE_TOKENS] if guided else [])],
        image_tokens=(side // PIXELS_OF_TOKEN) ** 2,
        height=side,
        width=side,
        num_inference_steps=steps,
        guidance=Guidance(scale=SCALE if guided else 1.0),
        seed=0,
    )


def mixed_requests(count: int, seed: int, huge_every: int = 0) -> list[DiffusionRequest]:
    """Every second one guided, sizes and steps drawn; every `huge_every`-th is of `HUGE_SIDE`."""
    draw = random.Random(seed)
    requests = []
    for n in range(count):
        side, steps, text = draw.choice(SIDES), draw.choice(STEPS), draw.choice(TEXT_TOKENS)
        is_huge = huge_every and n % huge_every == huge_every // 2
        requests.append(request(HUGE_SIDE if is_huge else side, steps, n % 2 == 0, text, str(n)))
    return requests


def work_us(spec: DiffusionRequest, cost: CostModel) -> float:
    """All that a request asks of ranks if none of its forwards shares a step."""
    step = sum(cost.step_us + cost.forward(spec.image_tokens + text) for text in spec.text_tokens)
    encode = sum(cost.encode(text) for text in spec.text_tokens[:1])  # the negative one is cached
    return spec.num_inference_steps * step + encode + cost.decode(spec.image_tokens)


def arrivals(specs: Sequence[DiffusionRequest], rate: float, burst: int, seed: int) -> list[Arrival]:
    """`rate` a second with exponential gaps between bursts of so many at once; bursts of one are Poisson's."""
    draw = random.Random(seed)
    now, trace = 0.0, []
    for n, spec in enumerate(specs):
        if n % burst == 0:
            now += 1e6 * draw.expovariate(rate / burst)
        trace.append(Arrival(now, spec))
    return trace
