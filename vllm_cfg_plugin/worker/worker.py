"""vLLM's worker interface over the step runner: device, process groups, pipeline."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import cast

import msgspec
import torch
import torch.distributed as dist
from vllm import envs
from vllm.config.vllm import OptimizationLevel
from vllm.distributed import init_distributed_environment
from vllm.platforms.interface import set_assigned_physical_gpu_ids
from vllm.v1.worker.worker_base import WorkerBase

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.config import PLUGIN_NAME, EngineSettings
from vllm_cfg_plugin.distributed import parallel_state, shared_memory
from vllm_cfg_plugin.distributed.sequence_group import SequenceGroups, current_group
from vllm_cfg_plugin.engine.calibration import Calibration
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.params import LoRA
from vllm_cfg_plugin.pipelines.common import fused
from vllm_cfg_plugin.pipelines.registry import describe
from vllm_cfg_plugin.worker.adapters import AdapterLimits
from vllm_cfg_plugin.worker.calibration import calibrate_rank
from vllm_cfg_plugin.worker.device_memory import device_memory
from vllm_cfg_plugin.worker.exchange import AllGather
from vllm_cfg_plugin.worker.loading import load_pipeline
from vllm_cfg_plugin.worker.noise_scheduler_check import check_noise_scheduler
from vllm_cfg_plugin.worker.pace import pace_of
from vllm_cfg_plugin.worker.runner import StepRunner
from vllm_cfg_plugin.worker.side_work import SideWork
from vllm_cfg_plugin.worker.warm_up import warm_up

logger = get_logger(__name__)


class DiffusionWorker(WorkerBase):
    """One cfg rank, or one of the processes that are it."""

    device: torch.device
    runner: StepRunner

    def init_device(self) -> None:
        """Choose the device and join the process groups."""
        if self.current_platform.device_type == "cpu":
            self.device = torch.device("cpu")
            # A rank is one core's work, and with more threads a row's result depends on the batch that it is in.
            torch.set_num_threads(1)
        else:
            self.local_rank = self._local_device()  # before the groups, which put their communicators there
            visible = self.current_platform.logical_device_id_to_visible_device_id(self.local_rank)
            self.device = torch.device(self.current_platform.device_type, visible)
            self.current_platform.set_device(self.device)
            self.current_platform.check_if_supports_dtype(cast(torch.dtype, self.model_config.dtype))
        settings = EngineSettings.from_vllm_config(self.vllm_config)
        init_distributed_environment(
            world_size=self.parallel_config.world_size,
            rank=self.rank,
            distributed_init_method=self.distributed_init_method,
            local_rank=self.local_rank,
            backend=self.current_platform.dist_backend,
        )
        parallel_state.initialize_model_parallel(
            settings.cfg_parallel_size,
            settings.tensor_parallel_size,
            sequence_parallel_size=settings.sequence_parallel_size,
        )
        self._groups = SequenceGroups(current_group(), parallel_state.make_sequence_group())
        # Here, where ranks meet anyway: a rank that can't load its model must not leave the others waiting.
        self._all_gather = make_all_gather(self.device)

    def _local_device(self) -> int:
        """Number of this rank's accelerator among those of the server: as vLLM's own worker of a GPU finds it.

        Replicas take consecutive blocks of them. With `--device-ids` it counts those.
        """
        parallel = self.parallel_config
        if parallel.assigned_physical_gpu_ids is not None:
            set_assigned_physical_gpu_ids(parallel.assigned_physical_gpu_ids)
        replica = parallel.data_parallel_rank_local
        replica = parallel.data_parallel_index if replica is None else replica
        return self.local_rank + replica * parallel.world_size

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the checkpoint's pipeline; every rank has its transformer, because any rank may own any branch."""
        eager = self.model_config.enforce_eager
        if self.vllm_config.optimization_level > OptimizationLevel.O0 and not eager:
            fused.enable()
        pipeline = load_pipeline(self.vllm_config, self.device, bool(self._text_encoder))
        info = describe(self._checkpoint)
        if info.call_arguments is None:  # else the pipeline sets and steps it as it likes
            check_noise_scheduler(pipeline, info)
        rank = parallel_state.get_classifier_free_guidance_rank()
        self.runner = StepRunner(
            pipeline,
            rank,
            parallel_state.get_classifier_free_guidance_world_size(),
            self._all_gather,
            SideWork(rank, self.device),
            pace_of(self.device),
            self._groups,
            EngineSettings.from_vllm_config(self.vllm_config).cfg_cache_bytes,
            self._adapter_limits,
        )

    def add_adapter(self, name: str, path: str, key: str) -> str:
        """Read an adapter, fields as of `LoRA`; returns why that can't be, or ""."""
        try:
            self.runner.beside.adapters.get(LoRA(name, path, key))
        except ConfigurationError as error:
            return str(error)
        return ""

    @property
    def _adapter_limits(self) -> AdapterLimits:
        settings = EngineSettings.from_vllm_config(self.vllm_config)
        on_host = settings.max_cpu_loras or settings.max_loras
        return AdapterLimits(settings.max_lora_rank, on_host, settings.max_loras)

    def calibrate(self) -> Calibration:
        """What work costs on this rank. The first call may measure it, so it must come before there is any work."""
        return self._calibration

    @cached_property
    def _calibration(self) -> Calibration:
        folder = Path(envs.VLLM_CACHE_ROOT) / PLUGIN_NAME
        ranks = self.parallel_config.world_size
        info = describe(self._checkpoint)
        if fused.is_enabled(self.device) and info.call_arguments is None:
            warm_up(self.runner.pipeline, info, self._groups.steps)
        found = calibrate_rank(
            self.runner.pipeline, self._checkpoint, folder, ranks, self._groups.steps, text_encoder=self._text_encoder
        )
        memory = device_memory(self.device)
        share = self.vllm_config.cache_config.gpu_memory_utilization
        return found if memory is None else msgspec.structs.replace(found, room=memory.room(share))

    @property
    def _text_encoder(self) -> str:
        """Where this rank has its text encoders, of `TEXT_ENCODERS`; "" where another rank encodes."""
        settings = EngineSettings.from_vllm_config(self.vllm_config)
        encodes = settings.encoder_rank in (None, parallel_state.get_classifier_free_guidance_rank())
        return (settings.cfg_text_encoder or "all") if encodes else ""

    @property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.model_config.model, self.model_config.revision)

    def get_model(self) -> torch.nn.Module:
        return self.runner.pipeline.transformer

    def reset_encoder_cache(self) -> None:
        """Forget text embeddings and all else that follows from weights, as vLLM asks after they were changed."""
        self.runner.beside.embeddings.clear()
        self.runner.beside.conditions.clear()
        self.runner.pipeline.forget_derived()

    def shutdown(self) -> None:
        self.runner.side.close()
        parallel_state.destroy_model_parallel()


def make_all_gather(device: torch.device) -> AllGather:
    """The step's one collective: [row] of every cfg rank -> [ranks, row].

    On a CPU through shared memory, where the ranks can reach each other's; elsewhere it is the cfg group's own.
    All ranks must call this together.
    """
    ranks = parallel_state.get_classifier_free_guidance_world_size()
    if ranks == 1:
        return lambda row: row.unsqueeze(0)
    group = parallel_state.get_cfg_group()
    if device.type == "cpu":
        gather = shared_memory.connect(group.rank_in_group, ranks, partial(_share, group.cpu_group, ranks))
        if gather is not None:
            return gather
        logger.info("The cfg ranks can't share memory; predictions go through the process group instead")
    return lambda row: group.all_gather(row.unsqueeze(0), dim=0)


def _share(group: dist.ProcessGroup, ranks: int, mine: object) -> list[object]:
    shared: list[object] = [None] * ranks
    dist.all_gather_object(shared, mine, group=group)
    return shared
