"""A machine with four H100s as vLLM's own CUDA platform sees it, made of answers; to be run in a process of its own.

`python -m tests.unit.cuda_machine MODEL FLAGS FLAGS ...`: for each text of flags of `vllm serve` it prints, as JSON,
what becomes of that server's ranks there.
"""

from __future__ import annotations

import copy
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

GPUS = 4


def become_cuda_machine() -> None:
    """To be called before anything else of vLLM is imported."""
    # vLLM's kernels, which need the GPU's driver; nothing here calls one.
    sys.modules["vllm._C_stable_libtorch"] = ModuleType("vllm._C_stable_libtorch")
    from vllm import platforms

    platforms.builtin_platform_plugins["cuda"] = lambda: "vllm.platforms.cuda.CudaPlatform"
    from vllm.platforms.cuda import CudaPlatform
    from vllm.platforms.interface import DeviceCapability

    answers = {
        "get_device_capability": DeviceCapability(9, 0),
        "get_device_total_memory": 80 * 2**30,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "device_count": GPUS,
        "is_pin_memory_available": True,
    }
    for name, answer in answers.items():
        setattr(CudaPlatform, name, classmethod(lambda cls, *args, answer=answer, **kwargs: answer))


def main() -> None:
    become_cuda_machine()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    top = FlexibleArgumentParser()
    make_arg_parser(top.add_subparsers().add_parser("serve"))
    model, *servers = sys.argv[1:]
    for flags in servers:
        args = top.parse_args(["serve", model, *flags.split()])
        args.model = args.model_tag  # as the subcommand does
        print(json.dumps(_server(AsyncEngineArgs.from_cli_args(args))))


def _server(engine_args: Any) -> dict[str, Any]:
    """What becomes of a server."""
    from vllm.platforms import current_platform

    try:
        config = engine_args.create_engine_config()
    except ValueError as error:
        return {"error": str(error)}
    parallel = config.parallel_config
    return {
        "platform": [base.__name__ for base in type(current_platform).__mro__],
        "dtype": str(config.model_config.dtype),
        "start_method": _start_method(config),
        "ranks": [
            _rank(config, replica, rank)
            for replica in range(parallel.data_parallel_size)
            for rank in range(parallel.world_size)
        ],
    }


def _start_method(config: Any) -> str:
    """How ranks are started."""
    from vllm_cfg_plugin.config import EngineSettings
    from vllm_cfg_plugin.executor.executor import CfgExecutor

    executor: Any = SimpleNamespace(
        vllm_config=config, model_config=config.model_config, device_config=config.device_config
    )
    start: Any = CfgExecutor._choose_start(executor, EngineSettings.from_vllm_config(config))
    return start.args[1].get_start_method()


def _rank(config: Any, replica: int, rank: int) -> dict[str, Any]:
    """A rank once it has its device: all that a worker does, but for what only a GPU or another rank can."""
    from vllm.platforms import interface

    from vllm_cfg_plugin.worker import worker as ours

    config = copy.deepcopy(config)
    config.parallel_config.data_parallel_rank_local = config.parallel_config.data_parallel_index = replica
    interface._assigned_physical_gpu_ids = None  # as in a new process
    world: dict[str, Any] = {}
    current: list[str] = []
    cfg_groups: list[list[int]] = []

    def build_groups(*sizes: int, sequence_parallel_size: int) -> None:
        cfg_groups.extend(state.cfg_group_ranks(world["world_size"], *sizes, sequence_parallel_size))

    state = ours.parallel_state
    with (
        patch.object(ours, "init_distributed_environment", lambda **arguments: world.update(arguments)),
        patch.object(state, "initialize_model_parallel", build_groups),
        patch.object(ours, "make_all_gather", lambda device: None),
        patch.object(torch.cuda, "set_device", lambda device: current.append(str(device))),
        patch.object(torch, "zeros", lambda *args, **kwargs: None),  # which vLLM puts on the device, to use it
    ):
        worker = ours.DiffusionWorker(config, local_rank=rank, rank=rank, distributed_init_method="tcp://here")
        worker.init_device()
    return {
        "device": str(worker.device),
        "current": current,
        # Where vLLM's `GroupCoordinator` puts its communicators.
        "communicators": f"cuda:{worker.current_platform.logical_device_id_to_visible_device_id(world['local_rank'])}",
        "backend": world["backend"],
        "world": [world["rank"], world["world_size"]],
        "cfg_groups": cfg_groups,
    }


if __name__ == "__main__":
    main()
