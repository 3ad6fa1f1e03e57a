"""vLLM's scheduler interface over `StepBatch`: its requests in, our plans with its scheduler outputs, results out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from vllm.v1.core.sched.interface import PauseState, SchedulerInterface
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.engine.batching import PlannedStep, StepBatch
from vllm_cfg_plugin.engine.calibration import calibration_of, max_side_us, max_step_us, token_budget
from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.engine.observers import Observers
from vllm_cfg_plugin.engine.plan import DECODED, KEPT, PREVIEWED, SideReport
from vllm_cfg_plugin.engine.request import ScheduledRequest
from vllm_cfg_plugin.engine.result import ResultHeader, pack_result
from vllm_cfg_plugin.engine.step_result import SideResult, StepResult
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.params import DiffusionRequest

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)

ClientOutput = tuple[int, EngineCoreOutput]  # client_index, output


@dataclasses.dataclass
class StepSchedulerOutput(SchedulerOutput):
    """vLLM's scheduler output with our plan riding along; it never leaves the engine's process.

    Attributes:
        planned: the plan for the ranks, which may be empty.
        awaits_side_work: there is nothing to tell the ranks, but side work to wait for.
        epoch: of the ranks that the plan is for.
        is_trial: it is known what they may die of.
    """

    planned: PlannedStep | None = None
    awaits_side_work: bool = False
    epoch: int = 0
    is_trial: bool = False


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
        limits = vllm_config.scheduler_config
        calibration = calibration_of(vllm_config)
        self.batch = StepBatch(
            settings.cfg_parallel_size,
            limits.max_num_seqs,
            token_budget(vllm_config),
            calibration.cost,
            max_step_us=max_step_us(vllm_config),
            max_side_us=max_side_us(vllm_config),
            processes=settings.processes,
            max_decode_tokens=calibration.decode_tokens_with_room,
            encoder_rank=settings.encoder_rank,
            max_adapters=settings.max_loras_of_requests,
        )
        self._include_finished_set = include_finished_set
        self._log_stats = log_stats
        engine = vllm_config.parallel_config.data_parallel_index
        self._observers = Observers(engine, settings.cfg_parallel_size, settings.progress_address, settings.cfg_trace)
        self._pause = PauseState.UNPAUSED
        self._epoch = 0  # of the ranks that know our requests
        self._ready: list[ClientOutput] = []  # outputs that need no rank
        self._last_counts = (0, 0)

    # ---- requests come and go ----

    def add_request(self, request: Request) -> None:
        """Queue a request. A bad one is answered with its error: raising would stop the engine for everybody."""
        try:
            params = request.pooling_params
            spec = msgspec.convert((params and params.extra_kwargs) or {}, DiffusionRequest)
            scheduled = self.batch.add(request.request_id, request.client_index, spec)
        except ValueError as error:  # msgspec's validation errors are some too
            header = ResultHeader(metrics=RequestMetrics(), error=f"not a diffusion request: {error}")
            self._ready.append((request.client_index, _output(request.request_id, FinishReason.ERROR, header)))
            return
        scheduled.trace_headers = request.trace_headers
        if self._log_stats:
            scheduled.events.append(EngineCoreEvent.new_event(EngineCoreEventType.QUEUED))

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """Take requests out of all queues; every rank forgets them with the next plan.

        For None (all of them: pause, shutdown) the aborted outputs come from our next update, because those that vLLM
        would send for the returned list have no pooling output, which stops its server.
        """
        if request_ids is None:
            gone: list[ScheduledRequest | None] = list(self.batch.all_requests())
            self._ready += [(r.client_index, _end_of(r, FinishReason.ABORT)) for r in gone if r is not None]
        else:
            names = [request_ids] if isinstance(request_ids, str) else request_ids
            gone = [self.batch.named(name) for name in names]
        for request in gone:
            if request is not None:
                self.batch.take_out(request)
        return []

    # ---- steps ----

    def schedule(self, throttle_prefills: bool = False) -> StepSchedulerOutput:
        """The next step's plan; empty when everything is planned already or the engine is paused."""
        planned = self.batch.next_plan(
            admit=self._pause == PauseState.UNPAUSED, step=self._pause != PauseState.PAUSED_ALL
        )
        self._observers.note_plan(planned, self.batch.waiting)
        if self._log_stats:
            for request in planned.admitted:
                request.events.append(EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED, request.admitted))
        is_empty = planned.plan.is_empty()
        awaits_side_work = is_empty and self.batch.awaits_side_work
        return StepSchedulerOutput(
            # vLLM counts an output without tokens as no step, and then sleeps for a millisecond.
            **_EMPTY_OUTPUT | {"total_num_scheduled_tokens": int(awaits_side_work or not is_empty)},
            planned=planned,
            awaits_side_work=awaits_side_work,
            epoch=self._epoch,
            is_trial=self.batch.is_trial,
        )

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        """Turn the ranks' merged reports of one step into outputs per client."""
        outputs, self._ready = self._ready, []
        if isinstance(scheduler_output, StepSchedulerOutput) and isinstance(model_runner_output, StepResult):
            outputs += self._outcome(scheduler_output, model_runner_output)
            self._observers.tell(is_idle=not len(self.batch))
        return self._to_clients(outputs)

    def _outcome(self, output: StepSchedulerOutput, result: StepResult) -> list[ClientOutput]:
        """What a step brought to its clients."""
        if result.epoch > self._epoch:
            return self._start_over(result)
        if result.epoch != output.epoch or output.planned is None:  # made for ranks that are gone
            return []
        outputs: list[ClientOutput] = []
        self.batch.note_result(output.planned, result)
        self._observers.note_result(output.planned, result)
        for id, message in result.failed.items():
            outputs += self._failed(self.batch.known(id), message)
        for side in result.side:
            outputs += self._side_work_done(side)
        return outputs

    def _start_over(self, result: StepResult) -> list[ClientOutput]:
        self._epoch = result.epoch
        self._observers.note_restart()
        outputs: list[ClientOutput] = []
        for request in self.batch.start_over(has_killed=result.was_lost):
            outputs += self._failed(
                request,
                f"the cfg ranks died {len(request.deaths) + len(request.lone_deaths)} times while they worked on it, "
                f"{len(request.lone_deaths)} times on nothing else",
            )
        return outputs

    def _side_work_done(self, side: SideResult) -> list[ClientOutput]:
        """The image or the failure that a side report may bring."""
        report, pixels = side
        request = self.batch.note_side_report(report)
        self._observers.note_side_result(side, request)
        if report.branch == PREVIEWED:
            return []
        if report.error:
            return self._failed(request, report.error, report.is_refused)
        if request is None or pixels is None:  # None: aborted meanwhile
            return []
        if report.branch >= 0:
            self.batch.share_embeds(report, bytes(pixels))
        elif report.branch == KEPT:
            (request.kept_steps,), request.kept = report.shape, bytes(pixels)
        return self._finished(request, report, pixels) if report.branch == DECODED else []

    def _finished(self, request: ScheduledRequest, report: SideReport, pixels: memoryview) -> list[ClientOutput]:
        self.batch.finish(request)
        now = time.monotonic()
        if request.done_steps < request.spec.steps:  # another rank's report of the last one is still on its way
            request.done_steps, request.denoised = request.spec.steps, now - report.milliseconds / 1e3
        metrics = request.metrics(now, report.milliseconds)
        header = ResultHeader(metrics=metrics, shape=report.shape)
        return [(request.client_index, _end_of(request, FinishReason.STOP, header, pixels))]

    def _failed(self, request: ScheduledRequest | None, message: str, is_refused: bool = False) -> list[ClientOutput]:
        """Retire a failed request on every rank; the plan already queued may still name it, and the ranks skip it."""
        if request is None:  # reported before, or aborted meanwhile
            return []
        self.batch.take_out(request)
        logger.warning("Request %s failed and left the batch: %s", request.request_id, message)
        header = ResultHeader(metrics=request.metrics(time.monotonic()), error=message, is_refused=is_refused)
        return [(request.client_index, _end_of(request, FinishReason.ERROR, header))]

    def _to_clients(self, outputs: list[ClientOutput]) -> dict[int, EngineCoreOutputs]:
        by_client: dict[int, EngineCoreOutputs] = {}
        for client_index, output in outputs:
            message = by_client.setdefault(client_index, EngineCoreOutputs(outputs=[]))
            message.outputs.append(output)
            if self._include_finished_set:
                message.finished_requests = {*(message.finished_requests or ()), output.request_id}
        if outputs or self._last_counts != self.get_request_counts():
            stats = self.make_stats()
            if stats is not None:
                carrier = next(iter(by_client.values()), None) or by_client.setdefault(0, EngineCoreOutputs())
                carrier.scheduler_stats = stats
        return by_client

    # ---- what else EngineCore asks ----

    def has_request(self, request_id: str) -> bool:
        return self.batch.named(request_id) is not None

    def get_num_unfinished_requests(self) -> int:
        """Requests that a step can serve; PAUSED_NEW leaves waiting ones out so that a drain can end."""
        running, waiting = self.get_request_counts()
        return {PauseState.UNPAUSED: running + waiting, PauseState.PAUSED_NEW: running}.get(self._pause, 0)

    def has_finished_requests(self) -> bool:
        """Whether ranks must still be told to forget requests, or clients to be answered."""
        return bool(self.batch.retired or self._ready)

    def get_request_counts(self) -> tuple[int, int]:
        waiting = len(self.batch.waiting)
        return len(self.batch) - waiting, waiting

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
        self._observers.close()


_EMPTY_OUTPUT = {
    field.name: getattr(SchedulerOutput.make_empty(), field.name) for field in dataclasses.fields(SchedulerOutput)
}


def _end_of(
    request: ScheduledRequest,
    reason: FinishReason,
    header: ResultHeader | None = None,
    pixels: bytes | memoryview = b"",
) -> EngineCoreOutput:
    """The final output of a request that was planned; without a header it was aborted."""
    output = _output(request.request_id, reason, header, pixels)
    output.events, output.trace_headers = request.events or None, request.trace_headers
    return output


def _output(
    request_id: str, reason: FinishReason, header: ResultHeader | None = None, pixels: bytes | memoryview = b""
) -> EngineCoreOutput:
    """A final output; without a header its tensor is empty: the request was aborted."""
    tensor = torch.empty(0) if header is None else pack_result(header, pixels)
    return EngineCoreOutput(request_id, [], pooling_output=tensor, finish_reason=reason)
