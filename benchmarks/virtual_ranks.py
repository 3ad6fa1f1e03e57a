"""Ranks of the virtual engine: they carry out plans as `worker/runner.py` does, but only count the time it takes.

A rank is a core that its threads share as the kernel shares it: the one that steps, and those of lower priority that
encode, decode and forward long requests (worker/side_work.py). Their work takes what the cost model says. Times are
microseconds. Must not import vLLM.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_cfg_plugin.engine.cost import CostModel
from vllm_cfg_plugin.engine.plan import DECODED, FORWARDED, PREVIEWED, SideReport, StepPlan
from vllm_cfg_plugin.engine.step_result import StepResult
from vllm_cfg_plugin.params import DiffusionRequest

# The kernel's weights of niceness 0, of short side threads on average and of long ones, see worker/side_work.py.
STEP_WEIGHT, SIDE_WEIGHT, LONG_WEIGHT = 1024, 495, 110
_ROUNDING_US = 1e-3
_CACHED_TEXT_US = 1.0


@dataclass(frozen=True)
class Overheads:
    """Microseconds that the cost model leaves out.

    Attributes:
        exchange_us: per step, for every other rank.
        request_us: per step, for every running request, on every rank: combine and step the noise scheduler.
        admit_us: per request, on every rank: noise and noise scheduler.
        engine_us: from the ranks' reports to the next plan.
    """

    exchange_us: float = 0.0
    request_us: float = 0.0
    admit_us: float = 0.0
    engine_us: float = 0.0


@dataclass
class SideTask:
    """A piece of side work, of which `left_us` are to be done.

    Attributes:
        prompt: what is encoded.
        began: when it became the first of its thread.
    """

    id: int
    branch: int
    left_us: float
    prompt: str = ""
    is_long: bool = False
    began: float = -1.0


@dataclass
class SideThread:
    """The work of one side thread."""

    weight: int
    tasks: deque[SideTask] = field(default_factory=deque)


class Core:
    """One rank's core.

    Attributes:
        now: until when its work is known.
        busy_us: what it forwarded.
        texts: prompts whose embeddings it holds; a cache that never overflows.
        reports: (time, report) of side work that was done and not taken yet, in order of time.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.now = 0.0
        self.busy_us = 0.0
        self.texts: set[str] = set()
        self.reports: deque[tuple[float, SideReport]] = deque()
        self._encoder, self._decoder, self._previewer = (SideThread(SIDE_WEIGHT) for _ in range(3))
        self._long_coder, self._forwarder = SideThread(LONG_WEIGHT), SideThread(LONG_WEIGHT)

    def add_side_work(self, task: SideTask) -> None:
        if task.branch == FORWARDED:
            thread = self._forwarder
        elif task.is_long:
            thread = self._long_coder
        else:
            thread = {DECODED: self._decoder, PREVIEWED: self._previewer}.get(task.branch, self._encoder)
        thread.tasks.append(task)

    def compute(self, us: float) -> None:
        """The stepping thread computes for `us`, and shares the core with side work."""
        while us > _ROUNDING_US and (active := self._active()):
            total = STEP_WEIGHT + _weight(active)
            took = min(us * total / STEP_WEIGHT, _first_end(active, total))
            us -= took * STEP_WEIGHT / total
            self._progress(active, took, total)
        self.now += us

    def wait(self, until: float) -> None:
        """The stepping thread waits, and side work has the core."""
        while self.now < until and (active := self._active()):
            total = _weight(active)
            self._progress(active, min(until - self.now, _first_end(active, total)), total)
        self.now = max(self.now, until)

    def next_report(self) -> float:
        """When the next side work is done if the stepping thread goes on waiting."""
        if self.reports:
            return self.reports[0][0]
        active = self._active()
        return self.now + _first_end(active, _weight(active)) if active else math.inf

    def _active(self) -> list[SideThread]:
        threads = (self._encoder, self._decoder, self._previewer, self._long_coder, self._forwarder)
        active = [thread for thread in threads if thread.tasks]
        for thread in active:
            task = thread.tasks[0]
            if task.began < 0:
                task.began = self.now
                if task.prompt in self.texts:
                    task.left_us = _CACHED_TEXT_US
        return active

    def _progress(self, active: Sequence[SideThread], us: float, total: int) -> None:
        self.now += us
        for thread in active:
            task = thread.tasks[0]
            task.left_us -= us * thread.weight / total
            if task.left_us <= _ROUNDING_US:
                thread.tasks.popleft()
                if task.branch >= 0:
                    self.texts.add(task.prompt)
                report = SideReport(task.id, task.branch, self.rank, (self.now - task.began) / 1e3)
                self.reports.append((self.now, report))


def _weight(threads: Sequence[SideThread]) -> int:
    return sum(thread.weight for thread in threads)


def _first_end(active: Sequence[SideThread], total: int) -> float:
    """Microseconds until the first of these threads has done a piece."""
    return min(thread.tasks[0].left_us / thread.weight for thread in active) * total


@dataclass
class RequestOnRanks:
    """What all ranks know of a request."""

    spec: DiffusionRequest
    owners: tuple[int, ...] = ()
    steps: int = 0


class VirtualRanks:
    """Carries out plans as `worker/runner.py` does, and keeps the time that it takes."""

    def __init__(self, ranks: int, cost: CostModel, overheads: Overheads) -> None:
        self.cores = [Core(rank) for rank in range(ranks)]
        self._cost = cost
        self._overheads = overheads
        self._requests: dict[int, RequestOnRanks] = {}
        self._running: dict[int, RequestOnRanks] = {}
        self._loads: list[float] | None = None  # of one step; None: who runs or who owns what has changed

    def run(self, plan: StepPlan, at: float) -> StepResult:
        """Carry out a plan that the ranks find at a time; the result comes when the slowest has done its part."""
        for core in self.cores:
            core.wait(at)
        began = min(core.now for core in self.cores)
        for admission in plan.admit:
            self._requests[admission.id] = RequestOnRanks(admission.request)
        self._on_all_ranks(len(plan.admit) * self._overheads.admit_us)
        for encode in plan.encodes:
            spec = self._requests[encode.id].spec
            took = self._cost.encode(spec.text_tokens[encode.branch])
            task = SideTask(encode.id, encode.branch, took, spec.prompts[encode.branch], encode.is_long)
            self.cores[encode.rank].add_side_work(task)
        for assign in plan.assign:
            if assign.owners is None:  # it sits steps out
                del self._running[assign.id]
            else:
                self._running[assign.id] = self._requests[assign.id]
                self._running[assign.id].owners = assign.owners
            self._loads = None
        if plan.advance or plan.long_steps:
            self._step(len(plan.long_steps))
        for preview in plan.previews:
            took = self._cost.decode(self._requests[preview.id].spec.image_tokens)
            self.cores[preview.rank].add_side_work(SideTask(preview.id, PREVIEWED, took, is_long=preview.is_long))
        for forward in plan.forwards:
            for rank, load in enumerate(self._loads_of(forward.id, forward.owners)):
                if load:
                    self.cores[rank].add_side_work(SideTask(forward.id, FORWARDED, load, is_long=True))
        for decode in plan.decodes:
            spec = self._requests.pop(decode.id).spec
            took = self._cost.decode(spec.image_tokens)
            self.cores[decode.rank].add_side_work(SideTask(decode.id, DECODED, took, is_long=decode.is_long))
        return StepResult(began / 1e6, max(core.now for core in self.cores) / 1e6)

    def take_reports(self, until: float) -> list[SideReport]:
        """Side reports that were sent until a time."""
        taken = []
        for core in self.cores:
            core.wait(until)
            while core.reports and core.reports[0][0] <= until:
                taken.append(core.reports.popleft())
        return [report for _, report in sorted(taken, key=lambda sent: sent[0])]

    def next_report(self) -> float:
        return min(core.next_report() for core in self.cores)

    def _on_all_ranks(self, us: float) -> None:
        for core in self.cores:
            core.compute(us)

    def _step(self, long: int) -> None:
        """Every rank forwards what it owns; all wait for the slowest and then step every request, and `long` others."""
        self._loads = loads = self._loads or self._line_up()
        for core, load in zip(self.cores, loads, strict=True):
            core.compute(load)
            core.busy_us += load
        exchanged = max(core.now for core in self.cores)
        for core in self.cores:
            core.wait(exchanged)
        others = len(self.cores) - 1
        stepped = len(self._running) + long
        self._on_all_ranks(self._overheads.exchange_us * others + self._overheads.request_us * stepped)
        for id, request in list(self._running.items()):
            request.steps += 1
            if request.steps == request.spec.num_inference_steps:
                del self._running[id]
                self._loads = None

    def _line_up(self) -> list[float]:
        """Each rank's forward of one step."""
        loads = [0.0] * len(self.cores)
        for id, request in self._running.items():
            loads = [sum(both) for both in zip(loads, self._forwards(id, request.owners), strict=True)]
        return [load + self._cost.step_us if load else 0.0 for load in loads]

    def _loads_of(self, id: int, owners: Sequence[int]) -> list[float]:
        """Each rank's forwards of one request alone, one after the other."""
        loads = self._forwards(id, owners)
        return [load + self._cost.step_us * owners.count(rank) for rank, load in enumerate(loads)]

    def _forwards(self, id: int, owners: Sequence[int]) -> list[float]:
        loads, spec = [0.0] * len(self.cores), self._requests[id].spec
        for owner, prompt, text_tokens in zip(owners, spec.prompts, spec.text_tokens, strict=False):
            if prompt not in self.cores[owner].texts:
                raise RuntimeError(f"request {id}: rank {owner} shall forward a branch whose text it does not hold")
            loads[owner] += self._cost.forward(spec.image_tokens + text_tokens)
        return loads
