"""vLLM's executor interface over a `RankPool`: step plans and method calls out, step results back."""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import count
from typing import Any

import cloudpickle
from vllm.utils.system_utils import get_mp_context
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.abstract import Executor, FailureCallback

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.compat import release_inherited_wakeup, report_failed_start
from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.engine import plan as wire
from vllm_cfg_plugin.engine.calibration import keep_calibration, slowest
from vllm_cfg_plugin.engine.plan import StepReport
from vllm_cfg_plugin.engine.step_result import SideResult, StepResult, merge_reports
from vllm_cfg_plugin.executor import channel
from vllm_cfg_plugin.executor.lifeline import die_with_parent
from vllm_cfg_plugin.executor.rank_pool import Frames, RankPool
from vllm_cfg_plugin.pipelines.registry import pipeline_class
from vllm_cfg_plugin.worker.loading import pipeline_for_forks

_SIDE_WAIT_SECONDS = 0.002


class CfgExecutor(Executor):
    """Runs step plans on `world_size` worker processes of this machine."""

    def _init_executor(self) -> None:
        self._failure_callback: FailureCallback | None = None
        self._calls = count()
        if multiprocessing.parent_process() is not None:
            # The API server started this process. Without this, killing it with -9 would leave the engine behind.
            die_with_parent()
            release_inherited_wakeup()
            if address := EngineSettings.from_vllm_config(self.vllm_config).failed_start_address:
                report_failed_start(address)
        with self._weights_for_ranks():
            self._pool = RankPool(
                self.vllm_config, self.parallel_config.world_size, self._process_context(), _read_answer
            )
        # For the scheduler, which vLLM makes later and gives nothing but this configuration.
        keep_calibration(self.vllm_config, slowest(self.collective_rpc("calibrate")))
        # Weakly: the monitor thread must not keep an executor alive that its engine let go of.
        self._pool.watch(partial(_call_if_alive, weakref.WeakMethod(self._notify_failure)))

    def _process_context(self) -> Any:
        """Fork on a CPU, which saves every rank the imports; elsewhere vLLM's choice: CUDA does not survive a fork."""
        if self.device_config.device_type != "cpu":
            return get_mp_context()
        pipeline_class(Checkpoint(self.model_config.model, self.model_config.revision))
        return multiprocessing.get_context("fork")

    def _weights_for_ranks(self) -> AbstractContextManager[None]:
        settings = EngineSettings.from_vllm_config(self.vllm_config)
        if settings.shares_weights(self.device_config.device_type):
            return pipeline_for_forks(self.vllm_config)
        return nullcontext()

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Send the plan to every rank; the future's result is the merged `StepResult`."""
        planned = getattr(scheduler_output, "planned", None)
        future: Future[Any]
        if planned is not None and not planned.plan.is_empty():
            payload = wire.encode(planned.plan)
            future = self._pool.send_to_all(channel.PLAN, planned.plan.step, payload, self._merge_reports)
        elif getattr(scheduler_output, "awaits_side_work", False):
            future = SideAnswer(self._pool)
        else:
            future = Future()
            future.set_result(StepResult())
        return future if non_block else future.result()

    def _merge_reports(self, reports: list[StepReport]) -> StepResult:
        return merge_reports(reports, take_side_results(self._pool))

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        **_: Any,
    ) -> Any:
        """Call a worker method by name, or a function with the worker as its first argument, on every rank."""
        number = next(self._calls)
        payload = cloudpickle.dumps((number, method, args, kwargs or {}))
        future = self._pool.send_to_all(channel.CALL, number, payload, _merge_calls)
        return future if non_block else future.result(timeout)

    def check_health(self) -> None:
        self._pool.check_health()

    def register_failure_callback(self, callback: FailureCallback) -> None:
        self._failure_callback = callback

    def _notify_failure(self) -> None:
        """Tell EngineCore once; called from the pool's monitor thread."""
        callback, self._failure_callback = self._failure_callback, None
        if callback is not None:
            callback()

    def shutdown(self) -> None:
        self._pool.close()

    # ---- what EngineCore asks of executors of language models ----

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    @property
    def supported_tasks(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("plugin",)

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        return [{} for _ in range(len(self._pool))]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["LBNHC"] for _ in range(len(self._pool))]

    def set_kv_cache_layout(self, *layout: Any) -> None:
        """There is no KV cache."""

    def initialize_from_config(self, kv_cache_configs: Any) -> None:
        """There is no KV cache."""

    def compile_or_warm_up_model(self) -> None:
        """Nothing is compiled."""

    def supports_draft_weight_updates(self) -> bool:
        return False

    def reset_mm_cache(self) -> None:
        """There is no multi-modal cache."""


def _call_if_alive(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    alive = method()
    if alive is not None:
        alive()


class SideAnswer(Future[StepResult]):
    """The next side reports; empty after a moment, because a new request must not wait for a long decode to end."""

    def __init__(self, pool: RankPool) -> None:
        super().__init__()
        self._pool = pool

    def result(self, timeout: float | None = None) -> StepResult:
        # While an answer to a plan is due, the engine waits for that one, and side reports come with it.
        if not self._pool.side_messages and not self._pool.has_pending:
            with suppress(TimeoutError):
                self._pool.pump(_SIDE_WAIT_SECONDS)
        return StepResult(side=take_side_results(self._pool))


def take_side_results(pool: RankPool) -> list[SideResult]:
    """Take the side reports that have arrived; pixels stay in ZMQ's buffers."""
    messages, pool.side_messages = pool.side_messages, []
    return [
        (wire.decode_side_report(payload), memoryview(pixels[0]) if pixels else None) for payload, *pixels in messages
    ]


def _read_answer(kind: bytes, frames: Frames) -> tuple[tuple[bytes, int], Any]:
    """Which message a rank's frames answer, and with what."""
    (payload,) = frames
    if kind == channel.REPORT:
        report = wire.decode_report(payload)
        return (channel.PLAN, report.step), report
    number, ok, value = cloudpickle.loads(payload)
    return (channel.CALL, number), (ok, value)


def _merge_calls(answers: list[tuple[bool, Any]]) -> list[Any]:
    for rank, (ok, value) in enumerate(answers):
        if not ok:
            raise RuntimeError(f"the call failed on cfg rank {rank}: {value}")
    return [value for _, value in answers]
