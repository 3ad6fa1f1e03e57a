"""The calibration of pipelines that run as diffusers' own: whole requests of growing size, by the contract alone.

Such a pipeline packs nothing, so there is no pack to be found that is worth waiting for: a step is as large as two
requests of the model's own size, so that small ones need not wait for a large one to end. Must not import vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.engine.calibration import Calibration
from vllm_cfg_plugin.engine.cost import UNCALIBRATED, CostModel, PackSample, fit_forward, fit_line
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline, generator_of
from vllm_cfg_plugin.pipelines.sample_request import sample_requests
from vllm_cfg_plugin.worker.stopwatch import ALL_RUNS_SECONDS

logger = get_logger(__name__)

T = TypeVar("T")

_SCALES = (0.25, 0.5, 1, 2)


@dataclass(frozen=True)
class _Sample:
    """One request: its tokens, the microseconds that its parts took, and the seconds of all that was tried."""

    tokens: int
    encode_us: float
    forward_us: float
    decode_us: float
    seconds: float


@torch.inference_mode()
def calibrate_calls(pipeline: EnginePipeline, info: PipelineInfo) -> Calibration:
    """Measure requests of growing size while there is time; where none can be made, every token costs 1."""
    began, samples = time.perf_counter(), list[_Sample]()
    for request in sample_requests(info, _SCALES):
        if samples and not _has_time(time.perf_counter() - began, samples[-1], request.image_tokens):
            break
        try:
            samples.append(_measure(pipeline, request))
        except Exception as error:  # of a pipeline that takes no such size: anything
            logger.info("No cost of %dx%d is known: %s", request.width, request.height, error)
    (default,) = sample_requests(info, (1,))
    tokens = max(1, default.image_tokens)
    return Calibration(cost=_fit(samples) if samples else UNCALIBRATED, token_budget=2 * tokens, default_tokens=tokens)


def _has_time(spent: float, last: _Sample, tokens: int) -> bool:
    return spent + last.seconds * tokens / last.tokens <= ALL_RUNS_SECONDS


def _fit(samples: list[_Sample]) -> CostModel:
    step_us, token_us, square_us = fit_forward([PackSample((each.tokens,), each.forward_us) for each in samples])
    decode_us, decode_token_us = fit_line([(each.tokens, each.decode_us) for each in samples])
    return CostModel(
        step_us=step_us,
        token_us=token_us,
        square_us=square_us,
        encode_us=max(each.encode_us for each in samples),
        encode_token_us=0,
        decode_us=decode_us,
        decode_token_us=decode_token_us,
    )


def _measure(pipeline: EnginePipeline, request: DiffusionRequest) -> _Sample:
    """A request from its beginning to its end."""
    began = time.perf_counter()
    _prepare(pipeline, request)  # the first time kernels are loaded, and the pipeline's calls looked at
    state, encode_us = _timed(lambda: _prepare(pipeline, request))
    scheduler, branches = state
    _, forward_us = min((_timed(lambda: _predict(pipeline, branches[0])) for _ in range(2)), key=lambda timed: timed[1])
    latents = branches[0].latents
    for step, timestep in enumerate(scheduler.timesteps):
        predictions = [_predict(pipeline, branch) for branch in branches]
        noise = pipeline.combine_branches(predictions, request, timestep, step)
        latents = pipeline.step_latents(scheduler, noise, timestep, latents)
    _, decode_us = _timed(lambda: pipeline.decode(latents, request))
    return _Sample(request.image_tokens, encode_us, forward_us, decode_us, time.perf_counter() - began)


def _prepare(pipeline: EnginePipeline, request: DiffusionRequest) -> tuple[Any, list[BranchInput]]:
    scheduler = pipeline.make_noise_scheduler(request)
    embeds = pipeline.encode_branch(request, 0)
    latents = pipeline.draw_noise(request, generator_of(request))
    first = scheduler.timesteps[0]
    return scheduler, [BranchInput(request, latents, embeds, first, branch) for branch in range(len(request.prompts))]


def _predict(pipeline: EnginePipeline, branch: BranchInput) -> torch.Tensor:
    prediction = pipeline.predict_noise(**pipeline.pack_branches([branch]))
    return pipeline.unpack_predictions(prediction, [branch])[0]


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and its microseconds: by the wall, as some of it is done by another thread."""
    began = time.perf_counter()
    done = action()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return done, max(1.0, 1e6 * (time.perf_counter() - began))
