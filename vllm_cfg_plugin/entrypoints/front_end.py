"""What the offline and the HTTP entry point share: prompt and parameters -> engine requests -> images.

The engine sees only what came through `FrontEnd.resolve`. Must not import FastAPI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from vllm.logger import init_logger
from vllm.outputs import PoolingRequestOutput
from vllm.pooling_params import PoolingParams

from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo
from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.engine.calibration import cost_from_ranks
from vllm_cfg_plugin.engine.cost import CostModel
from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.engine.prediction import predicted_seconds
from vllm_cfg_plugin.engine.result import unpack_result
from vllm_cfg_plugin.entrypoints.adapters import Adapters
from vllm_cfg_plugin.errors import (
    InputsRefusedError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestAbortedError,
    RequestFailedError,
)
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, ImageInput, RequestLimits
from vllm_cfg_plugin.pipelines.registry import describe
from vllm_cfg_plugin.resolve import resolve_requests
from vllm_cfg_plugin.tokens import TokenCounter

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own, see logs.py; with its `warning_once`


@dataclass(frozen=True)
class GeneratedImage:
    """One finished request: `pixels` uint8 [number, height, width, channels] and what happened on the way."""

    pixels: np.ndarray
    metrics: RequestMetrics


@dataclass(frozen=True)
class FrontEnd:
    """Turns what users write into engine requests; one per engine.

    Attributes:
        info: the served model.
        limits: what the operator allows.
        count_tokens: tokens that a prompt takes in the model.
        ranks: of one engine.
        cost: of work on one rank; None where it is not known.
        progress_address: where the engine publishes progress; empty where it does not.
        processes: number of processes of a rank.
        adapters: those that requests may carry.
    """

    info: PipelineInfo
    limits: RequestLimits
    count_tokens: Callable[[str], int]
    ranks: int = 1
    progress_address: str = ""
    cost: CostModel | None = None
    processes: int = 1
    adapters: Adapters = field(default_factory=Adapters)

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> FrontEnd:
        model_config = vllm_config.model_config
        checkpoint = Checkpoint(model_config.model, model_config.revision)
        settings = EngineSettings.from_vllm_config(vllm_config)
        info = describe(checkpoint)
        count_tokens = TokenCounter.of(checkpoint, info.text)
        ranks, processes = settings.cfg_parallel_size, settings.processes
        adapters = Adapters.of(settings)
        address = settings.progress_address
        return cls(info, settings.limits, count_tokens, ranks, address, processes=processes, adapters=adapters)

    def with_cost(self, answers: object) -> FrontEnd:
        """The same with the costs in the ranks' answers to the call of "calibrate"."""
        return replace(self, cost=cost_from_ranks(answers))

    def resolve(
        self, prompt: object, params: DiffusionParams, images: Sequence[ImageInput] = ()
    ) -> list[DiffusionRequest]:
        """Validate; one request per result.

        Raises:
            InvalidRequestError: naming the first wrong field.
        """
        adapters = self.adapters
        requests = resolve_requests(
            prompt, params, self.info, self.limits, self.count_tokens, images, adapters.named, adapters.most
        )
        self._check_seconds(requests)
        if requests[0].guidance_off:
            logger.warning_once("Guidance was asked for but is inactive: %s", requests[0].guidance_off)
        return requests

    def predict(self, request: DiffusionRequest) -> float | None:
        """Seconds that a request takes on an engine with nothing else to do; None where nobody knows."""
        return None if self.cost is None else predicted_seconds(request, 1, self.cost, self.ranks)

    def _check_seconds(self, requests: Sequence[DiffusionRequest]) -> None:
        if self.cost is None:
            return
        request, most = requests[0], self.limits.max_request_seconds
        seconds = predicted_seconds(request, len(requests), self.cost, self.ranks)
        if seconds > most:
            frames = ", or fewer frames" if self.info.produces == "video" else ""
            allowed = (
                f"fewer, or the size smaller{frames}{', or n smaller' * (len(requests) > 1)}: this request would take "
                f"about {seconds:.0f} s here, and {most} s are allowed (--max-request-seconds)"
            )
            raise InvalidRequestError("num_inference_steps", request.num_inference_steps, allowed)

    def bytes_of(self, images: Sequence[ImageInput], results: int) -> int:
        """What images of a request take, decoded: here once, and for each result in the engine and in its processes."""
        pixels = sum(image.width * image.height * len(image.mode) for image in images)
        return pixels * (1 + results * (1 + self.ranks * self.processes))


@contextmanager
def unpredicted_on_error() -> Iterator[None]:
    """If the ranks can't say what work costs, refuse no request for its predicted time; all else goes on."""
    try:
        yield
    except Exception as error:
        logger.warning("No request's time can be predicted, so max_request_seconds has no effect: %s", error)


def check_model_name(name: str | None, served: Sequence[str]) -> None:
    """Whether a request for a model of this name, if it names one, is for this server.

    Raises:
        ModelNotFoundError: it is not.
    """
    if name is not None and name not in served:
        raise ModelNotFoundError(f"model {name!r} does not exist; this server serves: {', '.join(served)}")


def pooling_params(request: DiffusionRequest) -> PoolingParams:
    """The request as vLLM carries it to the engine."""
    return PoolingParams(task="plugin", extra_kwargs=msgspec.to_builtins(request, builtin_types=(bytes,)))


def read_output(output: PoolingRequestOutput, e2e_time_ms: float) -> GeneratedImage:
    """The image in the engine's answer.

    Args:
        e2e_time_ms: from the call in the front end until now.

    Raises:
        RequestAbortedError: the engine was stopped or paused before the image was done.
        InputsRefusedError: the pipeline refused what the request asks for.
        RequestFailedError: the request failed while it ran.
    """
    data = output.outputs.data
    if data.numel() == 0:
        raise RequestAbortedError(
            f"request {output.request_id} was aborted: the engine was stopped or paused before its image was done"
        )
    header, pixels = unpack_result(data)
    if pixels is None:
        if header.is_refused:
            raise InputsRefusedError(header.error)
        raise RequestFailedError(f"request {output.request_id} failed: {header.error}")
    return GeneratedImage(pixels, msgspec.structs.replace(header.metrics, e2e_time_ms=e2e_time_ms))
