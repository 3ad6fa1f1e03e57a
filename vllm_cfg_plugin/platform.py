"""Our vLLM platform: the machine's own platform plus the wiring of a diffusion model.

The class derives from whatever platform stock vLLM finds (CUDA on a GPU machine), so that ordinary models are served
exactly as without this plugin; every hook below first asks whether the model is a diffusion pipeline.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.platforms import builtin_platform_plugins
from vllm.platforms.interface import Platform, PlatformEnum
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.registry import architectures
from vllm_cfg_plugin.vllm_options import check_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
# The user's choice: this module is imported before the `vllm` command sets the variable to spawn for everybody.
_users_start_method = os.environ.get(_START_METHOD)


_SIZES = ("pipeline_parallel_size", "prefill_context_parallel_size")


class HostPlatform(Platform):
    """A machine without an accelerator under vLLM's accelerator build: enough of a platform for diffusion."""

    # Not OOT: vLLM's shutdown would then call torch.accelerator.empty_cache(), which fails without an accelerator.
    _enum = PlatformEnum.CPU
    device_name = "cpu"
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "cpu"

    @classmethod
    def inference_mode(cls) -> torch.no_grad:
        return torch.no_grad()

    @classmethod
    def import_kernels(cls) -> None:
        """This build of vLLM has none for a CPU, which stock vLLM warns of."""

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """There is one CPU and it is current."""

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    def is_sleep_mode_available(self) -> bool:
        """Our executor sleeps by ending the ranks, with the flag or without."""
        return True

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check that this build of vLLM can run the model here.

        Raises:
            ConfigurationError: the model is not a diffusion pipeline.
        """
        model_config = vllm_config.model_config
        if model_config is not None and not is_diffusion(vllm_config):
            raise ConfigurationError(
                f"model {model_config.model!r} is not a diffusion pipeline of diffusers; on a machine "
                "without an accelerator this build of vLLM serves only those. Install vLLM's CPU build to "
                "serve other models here."
            )


def _builtin_platform() -> type[Platform]:
    """The platform that stock vLLM would choose here; ours for the CPU if it would choose none."""
    for detect in builtin_platform_plugins.values():
        if (qualname := detect()) is not None:
            return resolve_obj_by_qualname(qualname)
    return HostPlatform


_Base: type[Platform] = _builtin_platform()


class CfgPlatform(_Base):  # type: ignore[misc, valid-type]
    """The machine's platform, with diffusion models wired to our executor, scheduler and workers."""

    @classmethod
    def pre_register_and_update(cls, parser: argparse.ArgumentParser | None = None) -> None:
        super().pre_register_and_update(parser)
        if parser is not None:
            from vllm_cfg_plugin.cli import add_flags

            add_flags(parser, on_cpu=cls.device_type == "cpu")

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: VllmConfig) -> None:
        super().apply_config_platform_defaults(vllm_config)
        if is_diffusion(vllm_config):
            _turn_compilation_off(vllm_config)

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        super().check_and_update_config(vllm_config)
        if is_diffusion(vllm_config):
            settings = EngineSettings.from_vllm_config(vllm_config)
            _wire_parallelism(vllm_config, settings)
            _wire_scheduling(vllm_config)
            _check_device_count(cls, vllm_config)
            settings.shares_weights(cls.device_type)
            if cls.device_type == "cpu":
                _fork_the_engine(vllm_config)


def is_diffusion(vllm_config: VllmConfig) -> bool:
    model_config = vllm_config.model_config
    return model_config is not None and bool(set(model_config.architectures or ()) & architectures())


def _turn_compilation_off(vllm_config: VllmConfig) -> None:
    """vLLM compiles its own model classes; ours are diffusers'."""
    from vllm.config import CompilationMode, CUDAGraphMode

    vllm_config.compilation_config.mode = CompilationMode.NONE
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE


def _wire_parallelism(vllm_config: VllmConfig, settings: EngineSettings) -> None:
    """Assigns, never multiplies: vLLM calls this in the front end and again in the engine."""
    parallel = vllm_config.parallel_config
    check_options({name: getattr(parallel, name) for name in _SIZES}, lambda name: 1)
    if parallel.tensor_parallel_size > 1:
        raise ConfigurationError(
            f"tensor_parallel_size={parallel.tensor_parallel_size} is not valid here: `vllm serve`, `DiffusionLLM` and "
            "additional_config take it for a diffusion pipeline"
        )
    parallel.world_size = settings.cfg_parallel_size * settings.processes
    parallel.worker_cls = "vllm_cfg_plugin.worker.worker.DiffusionWorker"
    parallel.distributed_executor_backend = "vllm_cfg_plugin.executor.executor.CfgExecutor"
    parallel.disable_custom_all_reduce = True


def _wire_scheduling(vllm_config: VllmConfig) -> None:
    scheduling = vllm_config.scheduler_config
    scheduling.scheduler_cls = "vllm_cfg_plugin.engine.scheduler.StepScheduler"
    # Plan k+1 is queued on the ranks while they run plan k.
    scheduling.async_scheduling = True


def _fork_the_engine(vllm_config: VllmConfig) -> None:
    """Let the engine's process inherit the API server's imports, which halves the time until the server is ready.

    Not with replicas: vLLM's coordinator of replicas survives a kill -9 of the server, and would keep its port.
    """
    if _users_start_method is None and vllm_config.parallel_config.data_parallel_size == 1:
        os.environ[_START_METHOD] = "fork"


def _check_device_count(platform: type[Platform], vllm_config: VllmConfig) -> None:
    """vLLM's own check ran before the cfg ranks were added to the world size."""
    if platform.device_type != "cuda":
        return
    parallel = vllm_config.parallel_config
    needed = parallel.world_size * (parallel.data_parallel_size_local or 1)
    named = parallel.assigned_physical_gpu_ids
    # CudaPlatform and RocmPlatform have `device_count`.
    available = cast(Any, platform).device_count() if named is None else len(named)
    if needed > available:
        has = "this machine has" if named is None else "--device-ids names"
        raise ConfigurationError(
            f"{parallel.world_size} ranks (cfg_parallel_size x sequence_parallel_size x tensor_parallel_size) with "
            f"data_parallel_size_local={parallel.data_parallel_size_local} needs {needed} GPUs and {has} "
            f"{available}: lower it, or make more GPUs visible"
        )
