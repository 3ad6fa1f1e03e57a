"""One request inside the scheduler: what is asked, how far it is planned, how far it is done; must not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from vllm_cfg_plugin.engine.cost import CostModel
from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.params import MAX_CACHE_ORDER, DiffusionRequest, StepCache

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreEvent


_DEATHS_OF_A_SUSPECT = 2
# Not two: a rank that something kills and kills again at once dies at the same step both times.
_DEATHS_AT_ONE_STEP = 3
_MOST_DEATHS_ALONE = 5


@dataclass(eq=False)
class ScheduledRequest:
    """Life: waiting -> preparing (texts are being encoded) -> running (steps) -> draining (its image is not back yet).

    A long request's forwards run beside the steps of the others; it is `beside` where those are running.

    Attributes:
        request_id, client_index: vLLM's names for the request and for who asked.
        id: our integer name for it, used in plans.
        costs: predicted microseconds of each branch's forward.
        trace_headers: of the client's trace, which the span that vLLM makes of this request continues.
        arrived, admitted, began, denoised: seconds of the engine's clock.
        encode_ms: milliseconds of the text that took longest.
        overtaken: requests that came later and were admitted earlier.
        deaths: how many of its steps were done whenever ranks died while they knew it and others; lone_deaths: whenever
            nobody else could have been why.
        is_cleared: it has gone past the steps at which ranks died, so it was not why.
        is_long: it alone would give some rank more work in a step than a step may have.
        owners: cfg rank that forwards each branch, or will once it steps.
        assigned: the owners that the ranks were told last, those of one step; None: that it takes none.
        is_prepared: every rank has reported that it has drawn its noise.
        asked, holders: for each branch the ranks that were told to encode its text, and those that have.
        first_tick: number of the engine's step that is its first; of a long request nothing.
        long_steps: denoising steps of a long request that are planned.
        forwarding: ranks that have not yet reported their forwards of a long request's next step.
        done_steps: its steps that all ranks have reported.
        planned_previews, made_previews: previews that ranks were told to make, and those that are back.
        owed_us: predicted microseconds of them that those who do not stream have still to get back.
        kept_steps, kept: where it goes on when ranks start anew: after how many steps, and with what.
    """

    request_id: str
    client_index: int
    id: int
    spec: DiffusionRequest
    cost: CostModel
    arrived: float
    events: list[EngineCoreEvent] = field(default_factory=list)
    trace_headers: Mapping[str, str] | None = None
    admitted: float = 0.0
    began: float = 0.0
    denoised: float = 0.0
    encode_ms: float = 0.0
    overtaken: int = 0
    deaths: list[int] = field(default_factory=list)
    lone_deaths: list[int] = field(default_factory=list)
    is_cleared: bool = False
    is_long: bool = False
    owners: tuple[int, ...] = ()
    assigned: tuple[int, ...] | None = None
    is_prepared: bool = False
    asked: list[set[int]] = field(default_factory=list)
    holders: list[set[int]] = field(default_factory=list)
    first_tick: int = 0
    long_steps: int = 0
    forwarding: set[int] = field(default_factory=set)
    done_steps: int = 0
    planned_previews: int = 0
    made_previews: int = 0
    owed_us: int = 0
    kept_steps: int = 0
    kept: bytes = b""

    def note_death(self, alone: bool) -> None:
        """Ranks died while they knew it; `alone`: it and nobody else may have been why."""
        self.is_cleared = False
        (self.lone_deaths if alone else self.deaths).append(self.done_steps)

    def note_step(self) -> bool:
        """All ranks have reported a step of it; whether it is cleared by that."""
        self.done_steps += 1
        died_at = self.deaths + self.lone_deaths
        if not died_at or self.done_steps <= max(died_at) + 1:
            return False
        self.deaths, self.lone_deaths, self.is_cleared = [], [], True
        return True

    def start_over(self) -> None:
        """Wait again: what the ranks knew of it is gone."""
        self.admitted = self.began = self.denoised = self.encode_ms = 0.0
        self.owners, self.assigned = (), None
        self.is_prepared = False
        self.asked, self.holders = [], []
        self.first_tick = self.owed_us = 0
        self.long_steps = self.done_steps = self.kept_steps
        self.forwarding = set()
        self.planned_previews = self.made_previews  # those that are back would be the same again

    def preview_is_due(self, step: int) -> bool:
        """Whether to make the next preview after this step; one at a time is made."""
        points, planned = self.preview_steps, self.planned_previews
        is_free = planned == self.made_previews
        return is_free and planned < len(points) and points[planned] <= step < self.spec.steps

    @property
    def awaits_previews(self) -> bool:
        """Whether ranks are still to be told to make some."""
        return self.planned_previews < len(self.preview_steps)

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what kills the ranks: it is tried then, with none beside it that may be it too."""
        return len(self.deaths) + len(self.lone_deaths) >= _DEATHS_OF_A_SUSPECT

    @property
    def kills_ranks(self) -> bool:
        """Whether it surely does: what it dies of lies at one step, and what comes from outside hits it anywhere."""
        at_one_step = sum(abs(steps - self.lone_deaths[-1]) <= 1 for steps in self.lone_deaths)
        return at_one_step >= _DEATHS_AT_ONE_STEP or len(self.lone_deaths) >= _MOST_DEATHS_ALONE

    @cached_property
    def branch_tokens(self) -> tuple[int, ...]:
        return tuple(self.spec.sequence_tokens(branch) for branch in range(len(self.spec.prompts)))

    @cached_property
    def preview_steps(self) -> tuple[int, ...]:
        return self.spec.preview_steps

    @cached_property
    def costs(self) -> tuple[int, ...]:
        return tuple(self.cost.forward(tokens) for tokens in self.branch_tokens)

    @cached_property
    def work(self) -> int:
        """Predicted microseconds of all that it asks of ranks: what is least goes first."""
        encodes = sum(self.encode_cost(branch) for branch in range(len(self.costs)))
        forwards = sum(sum(self.costs[:branches]) for branches in self.forwarded)
        return forwards + encodes + self.cost.decode(self.spec.image_tokens)

    @cached_property
    def forwarded(self) -> tuple[int, ...]:
        """Branches that are forwarded at each of its steps, from branch 0 on.

        Fewer than all outside its guidance interval, and in steps that its cache spares; there it may be none.
        """
        return tuple(map(self.spec.branches_at, range(self.spec.steps)))

    @cached_property
    def changes(self) -> tuple[int, ...]:
        """For each of its steps the first one after it at which other branches are forwarded, or its end."""
        changes = [self.spec.steps] * self.spec.steps
        for step in reversed(range(self.spec.steps - 1)):
            is_alike = self.forwarded[step] == self.forwarded[step + 1]
            changes[step] = changes[step + 1] if is_alike else step + 1
        return tuple(changes)

    def encode_cost(self, branch: int) -> int:
        """Predicted microseconds to encode a branch's text and, as if they were decoded, the images."""
        images = self.cost.decode(self.spec.condition_tokens) if self.spec.condition_tokens else 0
        return self.cost.encode(self.spec.text_tokens[branch]) + images

    @property
    def last_tick(self) -> int:
        return self.first_tick + self.spec.steps - 1

    def branches_at(self, tick: int) -> int:
        """Branches that are forwarded at a tick, from branch 0 on."""
        return self.forwarded[tick - self.first_tick]

    def next_change(self, tick: int) -> int:
        """The first tick after this one at which other branches are forwarded, or none because it has ended."""
        return self.first_tick + self.changes[tick - self.first_tick]

    def alike_left(self, tick: int) -> int:
        """Ticks from this one on at which as many branches are forwarded as at this one."""
        left = self.forwarded[tick - self.first_tick :]
        return left.count(left[0])

    @property
    def long_owners(self) -> tuple[int, ...]:
        """Ranks that forward the branches of a long request's next step."""
        return self.owners[: self.forwarded[self.long_steps]]

    @property
    def is_ready(self) -> bool:
        """Whether it may step: every rank has its noise, and each branch's owner, or all that must, holds the text.

        Another rank that holds it may have no room for the branch beside its own.
        """
        if self.spec.on_all_ranks and self.holders[0] != self.asked[0]:
            return False
        return self.is_prepared and all(owner in held for owner, held in zip(self.owners, self.holders, strict=True))

    def metrics(self, now: float, decode_ms: float = 0.0) -> RequestMetrics:
        computed = self._steps_of_branches(self.spec.branches_at)
        needed = self._steps_of_branches(self.spec.branches_needed_at)
        return RequestMetrics(
            queue_ms=1e3 * ((self.admitted or now) - self.arrived),
            encode_ms=self.encode_ms,
            denoise_ms=max(0.0, 1e3 * (self.denoised - self.began)),
            decode_ms=decode_ms,
            steps=self.done_steps,
            computed_steps=computed,
            reused_steps=[total - own for total, own in zip(needed, computed, strict=True)],
            seed=self.spec.seed,
            guided=self.spec.guided,
            guidance_off=self.spec.guidance_off,
        )

    def _steps_of_branches(self, count_at: Callable[[int], int]) -> list[int]:
        """Of each branch the number of steps done that it was in; `count_at`: branches in a step, from branch 0 on."""
        counts = [count_at(step) for step in range(self.done_steps)]
        return [sum(count > branch for count in counts) for branch in range(len(self.spec.prompts))]


def check_plannable(spec: DiffusionRequest) -> None:
    """Check all that planning computes with: what goes wrong in a plan would stop the engine for everybody.

    Raises:
        ValueError: names the field.
    """
    if not spec.prompts or len(spec.text_tokens) != len(spec.prompts):
        raise ValueError(
            f"text_tokens={spec.text_tokens} is not valid for {len(spec.prompts)} prompts: give one number for each "
            "of at least one prompt"
        )
    if min(spec.num_inference_steps, spec.steps) < 1:
        raise ValueError(f"num_inference_steps={spec.num_inference_steps} is not valid: it must be at least 1")
    for name, tokens in (
        ("image_tokens", spec.image_tokens),
        ("condition_tokens", spec.condition_tokens),
        ("text_tokens", min(spec.text_tokens)),
    ):
        if tokens < 0:
            raise ValueError(f"{name}={tokens} is not valid: it must be at least 0")
    if not all(0 <= edge <= 1 for edge in spec.guidance.interval):
        raise ValueError(f"guidance_interval={spec.guidance.interval} is not valid: give two fractions from 0 to 1")
    if spec.cache is not None:
        _check_cache(spec.cache)


def _check_cache(cache: StepCache) -> None:
    if not all(0 <= edge <= 1 for edge in cache.range):
        raise ValueError(f"cache_range={cache.range} is not valid: give two fractions from 0 to 1")
    if cache.interval < 2:
        raise ValueError(f"cache_interval={cache.interval} is not valid: it must be at least 2")
    if not 0 <= cache.order <= MAX_CACHE_ORDER:
        raise ValueError(f"cache_order={cache.order} is not valid: it must be from 0 to {MAX_CACHE_ORDER}")
