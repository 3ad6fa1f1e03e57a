"""Loads the pipeline: once for every rank, or once in the engine's process for all ranks that it forks afterwards.

A forked rank maps the pages of what was loaded before the fork, and the kernel copies a page only when a process writes
to it, which no rank does to weights. So there is one copy of them without a file in /dev/shm, without its size limit
(64 MB in a default container) and without anything to clean up after a kill -9; and a rank whose weights are changed
after all, by a call on the worker, changes its own. Must not import diffusers.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from vllm_cfg_plugin.checkpoint import MODEL_INDEX, Checkpoint
from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.distributed.sequence_group import current_group
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.pipelines.base import EnginePipeline
from vllm_cfg_plugin.pipelines.common.tensor_parallel import divide
from vllm_cfg_plugin.pipelines.registry import pipeline_class

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)

_inherited: EnginePipeline | None = None


def load_pipeline(vllm_config: VllmConfig, device: torch.device, has_text_encoder: bool = True) -> EnginePipeline:
    """The pipeline that this process was forked with, or else a copy of its own.

    Args:
        has_text_encoder: False leaves the text encoders out, because another rank encodes.
    """
    if _inherited is not None:
        for name, plan in _inherited.tensor_plans().items():
            if (model := getattr(_inherited, name, None)) is not None:
                divide(model, plan, current_group().tensor, keeps_whole=True)
        return _inherited
    model_config, settings = vllm_config.model_config, EngineSettings.from_vllm_config(vllm_config)
    checkpoint = Checkpoint(model_config.model, model_config.revision)
    load = pipeline_class(checkpoint).load
    encoders = [name for name in checkpoint.read_json(MODEL_INDEX) or {} if name.startswith("text_encoder")]
    options: dict[str, Any] = {"variant": settings.variant} if settings.variant else {}
    if settings.quantization:
        options["quantization"] = settings.quantization
    if settings.cpu_offload_gb and device.type != "cpu":  # on a CPU that is where they are anyway
        options["offloaded_bytes"] = int(settings.cpu_offload_gb * 2**30)
    if not has_text_encoder:
        options |= dict.fromkeys(encoders)
    elif settings.cfg_text_encoder == "cpu" and device.type != "cpu":
        options["streamed"] = encoders
    dtype = cast(torch.dtype, model_config.dtype)  # vLLM resolved the name that it may have been
    started = time.perf_counter()
    pipeline = load(model_config.model, dtype=dtype, device=device, revision=model_config.revision, **options)
    logger.info("Loaded %s in %.2f s", model_config.model, time.perf_counter() - started)
    return pipeline


@contextmanager
def pipeline_for_forks(vllm_config: VllmConfig) -> Iterator[None]:
    """Processes forked inside share one copy of the weights; this process lets go of it at the end."""
    global _inherited
    with _one_thread():
        _inherited = load_pipeline(vllm_config, torch.device("cpu"))
    # The collector writes into the header of every object that it looks at, and so would copy their pages: 160 MB in
    # the engine alone.
    gc.freeze()
    try:
        yield
    finally:
        if multiprocessing.parent_process() is None:  # the engine runs in the user's process, whose garbage it is
            gc.unfreeze()
        _inherited = None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Loads without OpenMP's pool of threads, of which a fork would keep the locks and not the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
