"""vLLM's scheduler interface for denoising steps: who runs in the next step, on which ranks, and what came of the last
one.

A request joins at any engine step and leaves after its last; admission is first come first served under `max_num_seqs`
and `max_num_batched_tokens` (tokens per rank and step). Steps are known ahead, so the next plan is made before this
one's report.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState, SchedulerInterface
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.engine import planner
from vllm_cfg_plugin.engine.plan import Admission, Decode, DecodedImage, Forward, StepPlan
from vllm_cfg_plugin.engine.progress import ProgressPublisher
from vllm_cfg_plugin.engine.request import ScheduledRequest
from vllm_cfg_plugin.engine.result import RequestMetrics, ResultHeader, pack_result
from vllm_cfg_plugin.engine.step_result import StepResult
from vllm_cfg_plugin.params import DiffusionRequest

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


@dataclasses.dataclass
class StepSchedulerOutput(SchedulerOutput):
    """vLLM's scheduler output with our plan riding along; it never leaves the engine's process."""

    plan: StepPlan | None = None


class StepScheduler(SchedulerInterface):
    """Continuous batching of denoising steps."""

    # EngineCore reads these two; they are not in the interface.
    connector = None
    ec_connector = None

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: Any = None,
        structured_output_manager: Any = None,
        block_size: int = 0,
        hash_block_size: int = 0,
        mm_registry: Any = None,
        include_finished_set: bool = False,
        log_stats: bool = False,
    ) -> None:
        settings = EngineSettings.from_vllm_config(vllm_config)
        self._ranks = settings.cfg_parallel_size
        self._max_requests = vllm_config.scheduler_config.max_num_seqs
        self._max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._include_finished_set = include_finished_set
        self._log_stats = log_stats
        self._progress = ProgressPublisher(settings.progress_address) if settings.progress_address else None
        self._pause = PauseState.UNPAUSED
        self._ids = count()
        self._steps = count()
        self._waiting: deque[ScheduledRequest] = deque()
        self._running: dict[int, ScheduledRequest] = {}
        self._draining: dict[int, ScheduledRequest] = {}
        self._by_name: dict[str, ScheduledRequest] = {}
        self._retired: list[int] = []
        self._ready: list[tuple[int, EngineCoreOutput]] = []  # (client_index, output) that need no rank
        self._decodes = [0] * self._ranks
        self._last_counts = (0, 0)

    # ---- requests come and go ----

    def add_request(self, request: Request) -> None:
        """Queue a request. Never raises for a bad one: that would stop the engine for everybody."""
        try:
            params = request.pooling_params
            spec = msgspec.convert((params and params.extra_kwargs) or {}, DiffusionRequest)
        except msgspec.ValidationError as error:
            message = f"not a diffusion request: {error}"
            self._ready.append((request.client_index, _error_output(request.request_id, message)))
            return
        scheduled = ScheduledRequest(request.request_id, request.client_index, next(self._ids), spec)
        if self._log_stats:
            scheduled.events.append(EngineCoreEvent.new_event(EngineCoreEventType.QUEUED))
        self._waiting.append(scheduled)
        self._by_name[request.request_id] = scheduled

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """Take requests out of all queues; every rank forgets them with the next plan.

        For None (all of them: pause, shutdown) the aborted outputs come from our next update, because those that vLLM
        would send for the returned list have no pooling output, which stops its server.
        """
        if request_ids is None:
            names = list(self._by_name)
            for name in names:
                request = self._by_name[name]
                output = EngineCoreOutput(name, [], pooling_output=torch.empty(0), finish_reason=FinishReason.ABORT)
                self._ready.append((request.client_index, output))
        else:
            names = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        for name in names:
            gone = self._by_name.get(name)
            if gone is not None:
                self._forget(gone)
                self._retired.append(gone.id)
        return []

    def _forget(self, request: ScheduledRequest) -> None:
        del self._by_name[request.request_id]
        if self._running.pop(request.id, None) is None and self._draining.pop(request.id, None) is None:
            self._waiting.remove(request)

    # ---- the next plan ----

    def schedule(self, throttle_prefills: bool = False) -> StepSchedulerOutput:
        """The next step's plan; empty when everything is planned already or the engine is paused."""
        admitted = [] if self._pause else self._admit()
        active = [] if self._pause == PauseState.PAUSED_ALL else list(self._running.values())
        self._rebalance()
        loads = planner.rank_loads((request.load for request in active), self._ranks)
        plan = StepPlan(
            step=next(self._steps),
            retire=self._retired,
            admit=[Admission(request.id, request.spec) for request in admitted],
            forwards=[self._plan_forward(request) for request in active],
            decodes=self._plan_decodes(loads),
        )
        self._retired = []
        return _with_plan(plan, {request.request_id: sum(request.branch_tokens) for request in active})

    def _admit(self) -> list[ScheduledRequest]:
        """Requests that join now, in order of arrival; a request too large for the token budget runs alone."""
        admitted = []
        while self._waiting and len(self._running) < self._max_requests:
            request = self._waiting[0]
            loads = planner.rank_loads((r.load for r in self._running.values()), self._ranks)
            owners = planner.assign_owners(request.branch_tokens, loads)
            joined = planner.rank_loads(
                chain((r.load for r in self._running.values()), [planner.BranchLoad(0, request.branch_tokens, owners)]),
                self._ranks,
            )
            if self._running and max(joined) > self._max_tokens:
                break
            self._waiting.popleft()
            event = EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED)
            request.owners, request.admitted = owners, event.timestamp
            if self._log_stats:
                request.events.append(event)
            self._running[request.id] = request
            admitted.append(request)
        return admitted

    def _rebalance(self) -> None:
        for id, owners in planner.rebalance([r.load for r in self._running.values()], self._ranks).items():
            self._running[id].owners = owners

    def _plan_forward(self, request: ScheduledRequest) -> Forward:
        forward = Forward(request.id, request.planned_steps, request.owners)
        request.planned_steps += 1
        return forward

    def _plan_decodes(self, loads: list[int]) -> list[Decode]:
        """Decodes of the requests whose last step this plan holds; each counts as its image's tokens of work."""
        decodes = []
        loads = list(loads)
        for request in [r for r in self._running.values() if r.fully_planned]:
            rank = planner.choose_decode_rank(loads, self._decodes)
            loads[rank] += request.spec.image_tokens
            self._decodes[rank] += 1
            decodes.append(Decode(request.id, rank))
            self._draining[request.id] = self._running.pop(request.id)
        return decodes

    # ---- what came of it ----

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        """Turn the ranks' merged reports of one step into outputs per client."""
        outputs, self._ready = self._ready, []
        plan = scheduler_output.plan if isinstance(scheduler_output, StepSchedulerOutput) else None
        if plan is not None and isinstance(model_runner_output, StepResult):
            self._note_progress(plan, model_runner_output)
            outputs += [
                self._failed(id, message) for id, message in model_runner_output.failed.items() if self._active(id)
            ]
            outputs += [
                self._finished(image, pixels) for image, pixels in model_runner_output.images if self._active(image.id)
            ]
        return self._to_clients(outputs)

    def _active(self, id: int) -> ScheduledRequest | None:
        return self._running.get(id) or self._draining.get(id)

    def _note_progress(self, plan: StepPlan, result: StepResult) -> None:
        for forward in plan.forwards:
            request = self._active(forward.id)
            if request is None or forward.id in result.failed:
                continue
            request.began = request.began or result.began
            request.denoised = result.denoised
            request.encode_ms += result.encode_ms.get(forward.id, 0.0)
            request.done_steps = forward.index + 1
            if self._progress is not None and request.spec.progress_key:
                self._progress.publish(request.spec.progress_key, request.done_steps, request.spec.num_inference_steps)

    def _finished(self, image: DecodedImage, pixels: memoryview) -> tuple[int, EngineCoreOutput]:
        request = self._draining[image.id]
        self._forget(request)
        header = ResultHeader(metrics=request.metrics(image.decode_ms), height=image.height, width=image.width)
        output = EngineCoreOutput(
            request.request_id,
            [],
            pooling_output=pack_result(header, pixels),
            finish_reason=FinishReason.STOP,
            events=request.events or None,
        )
        return request.client_index, output

    def _failed(self, id: int, message: str) -> tuple[int, EngineCoreOutput]:
        """Retire the request on every rank; the plan already queued may still name it, and the ranks skip it there."""
        request = self._active(id)
        assert request is not None
        self._forget(request)
        self._retired.append(id)
        logger.warning("Request %s failed and left the batch: %s", request.request_id, message)
        return request.client_index, _error_output(request.request_id, message, request)

    def _to_clients(self, outputs: list[tuple[int, EngineCoreOutput]]) -> dict[int, EngineCoreOutputs]:
        by_client: dict[int, EngineCoreOutputs] = {}
        for client_index, output in outputs:
            message = by_client.setdefault(client_index, EngineCoreOutputs(outputs=[]))
            message.outputs.append(output)
            if self._include_finished_set:
                message.finished_requests = {*(message.finished_requests or ()), output.request_id}
        if outputs or self._last_counts != self.get_request_counts():
            stats = self.make_stats()
            if stats is not None:
                (
                    next(iter(by_client.values()), None) or by_client.setdefault(0, EngineCoreOutputs())
                ).scheduler_stats = stats
        return by_client

    # ---- what else EngineCore asks ----

    def get_num_unfinished_requests(self) -> int:
        """Requests that a step can serve; PAUSED_NEW leaves waiting ones out so that a drain can end."""
        waiting = 0 if self._pause == PauseState.PAUSED_NEW else len(self._waiting)
        return 0 if self._pause == PauseState.PAUSED_ALL else waiting + len(self._running) + len(self._draining)

    def has_finished_requests(self) -> bool:
        """Whether ranks must still be told to forget requests, or clients to be answered."""
        return bool(self._retired or self._ready)

    def get_request_counts(self) -> tuple[int, int]:
        return len(self._running) + len(self._draining), len(self._waiting)

    def make_stats(self) -> SchedulerStats | None:
        if not self._log_stats:
            return None
        self._last_counts = self.get_request_counts()
        return SchedulerStats(num_running_reqs=self._last_counts[0], num_waiting_reqs=self._last_counts[1])

    @property
    def pause_state(self) -> PauseState:
        return self._pause

    def set_pause_state(self, pause_state: PauseState) -> None:
        self._pause = pause_state

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        return True

    def reset_encoder_cache(self) -> None:
        """Text embeddings are the workers' (see the executor's `reset_encoder_cache`)."""

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> None:
        return None

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """There are no draft tokens."""

    def update_draft_token_ids_in_output(self, draft_token_ids: Any, scheduler_output: SchedulerOutput) -> None:
        """There are no draft tokens."""

    def shutdown(self) -> None:
        if self._progress is not None:
            self._progress.close()


def _with_plan(plan: StepPlan, tokens: dict[str, int]) -> StepSchedulerOutput:
    empty = SchedulerOutput.make_empty()
    fields = {field.name: getattr(empty, field.name) for field in dataclasses.fields(empty)}
    return StepSchedulerOutput(
        **{**fields, "num_scheduled_tokens": tokens, "total_num_scheduled_tokens": sum(tokens.values())}, plan=plan
    )


def _error_output(request_id: str, message: str, request: ScheduledRequest | None = None) -> EngineCoreOutput:
    metrics = RequestMetrics() if request is None else request.metrics()
    return EngineCoreOutput(
        request_id,
        [],
        pooling_output=pack_result(ResultHeader(metrics=metrics, error=message)),
        finish_reason=FinishReason.ERROR,
        events=(request.events or None) if request is not None else None,
    )
