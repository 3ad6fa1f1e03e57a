"""vLLM's executor interface over an engine's `Ranks`: step plans and method calls out, step results back."""

from __future__ import annotations

import multiprocessing
import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, cast

import cloudpickle
import torch
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.abstract import Executor, FailureCallback

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.compat.engine_deaths import report_end, tell_why
from vllm_cfg_plugin.compat.engines import answer_rejected_requests
from vllm_cfg_plugin.compat.forks import release_inherited_wakeup
from vllm_cfg_plugin.config import EngineSettings, additional_config
from vllm_cfg_plugin.engine import plan as wire
from vllm_cfg_plugin.engine.calibration import Calibration, keep_calibration, slowest, step_timeout_s
from vllm_cfg_plugin.engine.plan import StepPlan
from vllm_cfg_plugin.engine.step_result import StepResult
from vllm_cfg_plugin.errors import ConfigurationError, RankDiedError, RanksRestartedError
from vllm_cfg_plugin.executor import channel
from vllm_cfg_plugin.executor.answers import (
    CALL_AGAIN,
    CallAnswer,
    PlanAnswer,
    SideAnswer,
    done,
    merge_calls,
    merge_plan_reports,
    read_answer,
)
from vllm_cfg_plugin.executor.health import address_of, answer_health
from vllm_cfg_plugin.executor.lifeline import die_with_parent
from vllm_cfg_plugin.executor.rank_pool import RankPool
from vllm_cfg_plugin.executor.rank_processes import OwnProcesses, StartRanks
from vllm_cfg_plugin.executor.ranks import Ranks
from vllm_cfg_plugin.executor.restarts import RestartLimit
from vllm_cfg_plugin.executor.template import LEAST_ANSWER_SECONDS, Template
from vllm_cfg_plugin.memory.placement import Card
from vllm_cfg_plugin.memory.start import choose_places
from vllm_cfg_plugin.pipelines.adapter_files import find_adapter
from vllm_cfg_plugin.pipelines.registry import pipeline_class

_ASLEEP = {"weights", "kv_cache"}  # vLLM's names of what a sleeping engine has let go of


class CfgExecutor(Executor):
    """Runs step plans on `world_size` worker processes of this machine."""

    def _init_executor(self) -> None:
        self._failure_callback: FailureCallback | None = None
        self._calls = count()
        self._template: Template | None = None
        settings = EngineSettings.from_vllm_config(self.vllm_config)
        self._cause_address = settings.cause_address
        if multiprocessing.parent_process() is not None:
            # The API server started this process. Without this, killing it with -9 would leave the engine behind.
            die_with_parent()
            release_inherited_wakeup()
            answer_rejected_requests()
            if self._cause_address:
                report_end(self._cause_address)
        settings = self._settle_settings(settings)
        make_pool = partial(
            RankPool,
            self._choose_start(settings),
            [settings.rank_name(process) for process in range(self.parallel_config.world_size)],
            read_answer,
            partial(step_timeout_s, self.vllm_config),
        )
        try:
            self._ranks = ranks = Ranks(make_pool, RestartLimit(settings.cfg_max_restarts))
        except BaseException:
            self._close_template()
            raise
        if settings.health_address:
            address = address_of(settings.health_address, self.parallel_config.data_parallel_index)
            answer_health(address, lambda: not ranks.is_restarting)
        try:
            # For the scheduler, which vLLM makes later and gives nothing but this configuration.
            keep_calibration(self.vllm_config, slowest(self._calibrate()))
            self._read_adapters(settings)
        except BaseException:
            self.shutdown()
            raise
        # Weakly: the monitor thread must not keep an executor alive that its engine let go of.
        self._ranks.watch(partial(_call_if_alive, weakref.WeakMethod(self._notify_failure)))

    def _settle_settings(self, settings: EngineSettings) -> EngineSettings:
        """The settings, with those decided that depend on the GPUs; ranks and scheduler find them there too."""
        config, card = self.vllm_config, None
        if self.device_config.device_type != "cpu":
            card = Card(current_platform.get_device_total_memory(), config.cache_config.gpu_memory_utilization)
        checkpoint = Checkpoint(self.model_config.model, self.model_config.revision)
        places = choose_places(checkpoint, settings, cast(torch.dtype, self.model_config.dtype), card)
        config.additional_config = {**additional_config(config), **places}
        return EngineSettings.from_vllm_config(config)

    def _calibrate(self) -> list[Calibration]:
        """What every rank measures; ranks that die of it are started anew as often as may be."""
        while True:
            with suppress(RanksRestartedError):
                calibrations: list[Calibration] = self.collective_rpc("calibrate")
                return calibrations

    def _read_adapters(self, settings: EngineSettings) -> None:
        """Have the ranks read the operator's adapters; when they are started anew they do that as requests come.

        Raises:
            ConfigurationError: one does not fit the model.
        """
        for name, path in settings.lora_modules.items():
            lora = find_adapter(name, path)
            if problem := self.collective_rpc("add_adapter", args=(lora.name, lora.path, lora.key))[0]:
                raise ConfigurationError(problem)

    def _choose_start(self, settings: EngineSettings) -> StartRanks:
        """Fork on a CPU, which saves every rank the imports; elsewhere spawn, as accelerators do not survive forks."""
        if self.device_config.device_type != "cpu":
            # Packs of all sizes leave holes of all sizes, which torch can't use unless its segments can grow. Pinned
            # memory of whole layers would grow to the next power of two.
            if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
                os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True,pinned_max_round_threshold_mb:64"
            return partial(OwnProcesses, self.vllm_config, multiprocessing.get_context("spawn"))
        pipeline_class(Checkpoint(self.model_config.model, self.model_config.revision))  # imported once for all
        if settings.shares_weights(self.device_config.device_type):
            self._template = Template(self.vllm_config, max(LEAST_ANSWER_SECONDS, settings.cfg_step_timeout))
            return self._template.start_ranks
        return partial(OwnProcesses, self.vllm_config, multiprocessing.get_context("fork"))

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Send the plan to every rank; the future's result is the merged `StepResult`."""
        future = self._answer_to(scheduler_output)
        return future if non_block else future.result()

    def _answer_to(self, output: SchedulerOutput) -> Future[Any]:
        ranks = self._ranks
        epoch = getattr(output, "epoch", ranks.epoch)
        planned = getattr(output, "planned", None)
        with ranks.lock:
            ranks.is_trial = getattr(output, "is_trial", False)
            if epoch != ranks.epoch:
                return done(StepResult(epoch=ranks.epoch))
            if planned is not None and not planned.plan.is_empty():
                return self._send(planned.plan)
        if getattr(output, "awaits_side_work", False):
            return SideAnswer(ranks)
        return done(StepResult(epoch=epoch))

    def _send(self, plan: StepPlan) -> Future[Any]:
        ranks = self._ranks
        merge = partial(merge_plan_reports, ranks.pool, ranks.epoch)
        try:
            pending = ranks.pool.send_to_all(channel.PLAN, plan.step, wire.encode(plan), merge)
        except RankDiedError as error:
            ranks.restart(error)
            return done(StepResult(epoch=ranks.epoch, was_lost=True))
        return PlanAnswer(ranks, pending)

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        **_: Any,
    ) -> Any:
        """Call a worker method by name, or a function with the worker as its first argument, on every rank.

        Raises:
            RanksRestartedError: the ranks were started anew meanwhile; what the call did is undone.
            RuntimeError: the engine sleeps.
        """
        if self._ranks.is_asleep:
            if method == "synchronize_device":  # asked when it is told to sleep again: there is none that works
                return []
            raise RuntimeError("the engine sleeps and has no ranks to call: wake it up first")
        number = next(self._calls)
        payload = cloudpickle.dumps((number, method, args, kwargs or {}))
        ranks = self._ranks
        with ranks.lock:
            try:
                pending = ranks.pool.send_to_all(channel.CALL, number, payload, partial(merge_calls, ranks.pool.names))
            except RankDiedError as error:
                ranks.restart(error)
                raise RanksRestartedError(CALL_AGAIN) from error
            future = CallAnswer(ranks, pending)
        return future if non_block else future.result(timeout)

    def check_health(self) -> None:
        self._ranks.pool.check_health()

    def sleep(self, level: int = 1) -> None:
        """End the ranks; level 2 drops the weights too that the process they are forked from holds on a CPU."""
        if not self.is_sleeping:
            self._ranks.sleep()
            self.sleeping_tags |= _ASLEEP
        if level > 1:
            self._close_template()

    def reset_encoder_cache(self) -> None:
        """Also called when a sleeping engine is told to sleep: there is no cache then."""
        if not self._ranks.is_asleep:
            super().reset_encoder_cache()

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Start the ranks again, with the tag of weights; for that of the KV cache there is nothing to do."""
        woken = self.sleeping_tags & set(tags or _ASLEEP)
        if "weights" in woken:
            self._ranks.wake_up()
        self.sleeping_tags -= woken

    def register_failure_callback(self, callback: FailureCallback) -> None:
        self._failure_callback = callback

    def _notify_failure(self, error: Exception) -> None:
        """Tell EngineCore once, which does not ask why; called from the thread that watches the ranks."""
        callback, self._failure_callback = self._failure_callback, None
        if callback is not None:
            if self._cause_address:
                tell_why(self._cause_address, f"the engine died: {error}")
            callback()

    def shutdown(self) -> None:
        self._ranks.close()
        self._close_template()

    def _close_template(self) -> None:
        if self._template is not None:
            self._template.close()

    # ---- what EngineCore asks of executors of language models ----

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    @property
    def supported_tasks(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("plugin",)

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        return [{} for _ in range(self.parallel_config.world_size)]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["LBNHC"] for _ in range(self.parallel_config.world_size)]

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


def _call_if_alive(method: weakref.WeakMethod[Callable[[Exception], None]], error: Exception) -> None:
    alive = method()
    if alive is not None:
        alive(error)
