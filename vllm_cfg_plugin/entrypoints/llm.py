"""Offline use: `DiffusionLLM(model).generate(prompts)`, on vLLM's own LLMEngine."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec
from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.compat.engine_deaths import end_has_cause, wake_on_engine_death
from vllm_cfg_plugin.compat.engines import end_output_thread
from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.entrypoints.adapters import unusable, with_adapter
from vllm_cfg_plugin.entrypoints.engine_args import diffusion_engine_args
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd, pooling_params, read_output, unpredicted_on_error
from vllm_cfg_plugin.entrypoints.images.inputs import read_images
from vllm_cfg_plugin.entrypoints.output import DiffusionOutput
from vllm_cfg_plugin.entrypoints.progress_bar import StepBar
from vllm_cfg_plugin.errors import CfgPluginError, InvalidRequestError
from vllm_cfg_plugin.model import PLACEHOLDER_PROMPT
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, ImageInput

Prompt = str | Mapping[str, Any]

_PROMPT_KEYS = ("prompt", "negative_prompt", "image")
_ENGINE_DIED = "the engine has died, see its log above; close this DiffusionLLM and make a new one"


@dataclass
class _Running:
    """One result's request between the engine's queue and its output."""

    request: DiffusionRequest
    started: float
    pictures: list[Image.Image] = field(default_factory=list)  # the image, its layers, or the frames of a video
    error: str | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


class DiffusionLLM:
    """A diffusion model with its engine; a context manager.

    Threads may share it: their calls run one after the other. A process that was forked may not use it.
    One that is never closed stops its engine when it is garbage-collected or the interpreter ends.

    Args:
        model: diffusers folder or hub repository id.
        cfg_parallel_size: ranks (GPUs) that share the branches of guidance; 1 runs them one after the other.
        engine_args: settings of ours, such as `tensor_parallel_size`, or anything that vLLM's `EngineArgs` takes.

    Raises:
        ConfigurationError: the model can't be served, or not with these arguments.
    """

    def __init__(self, model: str, cfg_parallel_size: int = 1, **engine_args: Any) -> None:
        self._engine: LLMEngine | None = None
        self._died = False
        self._lock = threading.RLock()  # ZeroMQ's sockets end a program in which two threads use them
        self._pid = os.getpid()
        self._ids = itertools.count()
        args = diffusion_engine_args(model, cfg_parallel_size, **engine_args)
        address = args["additional_config"]["cause_address"]
        with _children_ignore_ctrl_c(), end_has_cause(address):
            self._engine = LLMEngine.from_engine_args(EngineArgs(**args))
        # Newer than vLLM's own finalizers, so at exit it runs before them.
        self._finalizer = weakref.finalize(self, _stop, self._engine, self._pid)
        try:
            wake_on_engine_death(self._engine.engine_core)
            self._front_end = FrontEnd.from_vllm_config(self._engine.vllm_config)
            with unpredicted_on_error():
                self._front_end = self._front_end.with_cost(self._engine.collective_rpc("calibrate"))
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> PipelineInfo:
        """What the model can do: the name of its guidance scale, its defaults, the images it takes, ..."""
        return self._front_end.info

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: DiffusionParams | Iterable[DiffusionParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Iterable[LoRARequest | None] | None = None,
    ) -> list[DiffusionOutput]:
        """Generate images or videos; one output per prompt, in order.

        Args:
            prompts: a text, a mapping with "prompt", "negative_prompt" (which wins over that of `params`) and "image"
                (a PIL image, a path, a file's bytes or a list of those), or several texts and mappings.
            params: of all prompts, or one each.
            use_tqdm: show a progress bar over the denoising steps.
            lora_request: an adapter of all prompts, or one each, beside those that `params` name. One that is new is
                read first.

        Raises:
            InvalidRequestError (a ValueError): an argument is wrong; nothing has run.
            CfgPluginError: closed, of another process, or the engine died earlier. If it dies during the call, what was
                done is returned and the rest has `.error` set, as has every other request that failed while it ran.
        """
        self._usable_engine()
        texts, resolved = self._resolve(prompts, params, lora_request)
        prefixes = [f"diffusion-{next(self._ids)}" for _ in texts]
        running = {
            f"{prefix}-{index}": _Running(request, time.perf_counter())
            for prefix, requests in zip(prefixes, resolved, strict=True)
            for index, request in enumerate(requests)
        }
        steps = {request_id: entry.request.steps for request_id, entry in running.items()}
        with self._lock, StepBar(self._front_end.progress_address, steps) if use_tqdm else nullcontext() as bar:
            self._run(self._usable_engine(), running, bar)
        by_id = iter(running.values())
        return [
            _output(self._front_end.info, prefix, text, [next(by_id) for _ in requests])
            for prefix, text, requests in zip(prefixes, texts, resolved, strict=True)
        ]

    def _resolve(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: DiffusionParams | Iterable[DiffusionParams] | None,
        lora_request: LoRARequest | Iterable[LoRARequest | None] | None,
    ) -> tuple[list[str], list[list[DiffusionRequest]]]:
        """The texts and each one's requests."""
        several = isinstance(prompts, Iterable) and not isinstance(prompts, (str, Mapping))
        prompt_list = list(prompts) if several else [prompts]
        spread = _spread(params, len(prompt_list)), self._spread_loras(lora_request, len(prompt_list))
        texts, resolved = [], []
        for index, (prompt, prompt_params, lora) in enumerate(zip(prompt_list, *spread, strict=True)):
            try:
                text, prompt_params = _unpack(prompt, prompt_params)
                prompt_params = with_adapter(prompt_params, lora.lora_name) if lora else prompt_params
                resolved.append(self._front_end.resolve(text, prompt_params, self._images_of(prompt)))
                texts.append(text)
            except InvalidRequestError as error:
                raise (error.within(f"prompts[{index}].") if several else error) from None
        return texts, resolved

    def _spread_loras(
        self, lora_request: LoRARequest | Iterable[LoRARequest | None] | None, count: int
    ) -> list[LoRARequest | None]:
        """One for each prompt, all of them known to the ranks."""
        is_one = lora_request is None or isinstance(lora_request, LoRARequest)
        several: list[Any] = [lora_request] * count if is_one else list(lora_request)  # type: ignore[arg-type]
        if len(several) != count or not all(lora is None or isinstance(lora, LoRARequest) for lora in several):
            raise InvalidRequestError("lora_request", several, f"one LoRARequest, or as many as prompts ({count})")
        for lora in filter(None, several):
            self._add_adapter(lora)
        return several

    def _add_adapter(self, request: LoRARequest) -> None:
        adapters = self._front_end.adapters
        lora = adapters.find(request.lora_name, request.lora_path, in_place=True)
        if adapters.named.get(lora.name) == lora:
            return
        with self._lock:
            arguments = (lora.name, lora.path, lora.key)
            problems = self._usable_engine().collective_rpc("add_adapter", args=arguments)
        if problems[0]:
            raise unusable(request.lora_path, problems[0])
        adapters.add(lora)

    def _images_of(self, prompt: Any) -> list[ImageInput]:
        images = prompt.get("image") if isinstance(prompt, Mapping) else None
        return [] if images is None else read_images(images, "image", self._front_end.limits.max_input_pixels)

    def _run(self, engine: LLMEngine, running: dict[str, _Running], bar: StepBar | None) -> None:
        """Run all requests to their end; on Ctrl-C or any other error abort those that are left."""
        left = set(running)
        try:
            for request_id, entry in running.items():
                key = request_id if bar else ""
                request = msgspec.structs.replace(entry.request, progress_key=key)
                engine.add_request(request_id, PLACEHOLDER_PROMPT, pooling_params(request))
            while left:
                for output in engine.step():
                    if output.finished and output.request_id in left:
                        left.remove(output.request_id)
                        _finish(running[output.request_id], output)
                        if bar:
                            bar.finish(output.request_id)
        except EngineDeadError:
            self._died = True
            for request_id in left:
                running[request_id].error = _ENGINE_DIED
        except BaseException:
            with suppress(EngineDeadError):
                engine.abort_request(sorted(left))
            raise

    def _usable_engine(self) -> LLMEngine:
        if os.getpid() != self._pid:
            raise CfgPluginError(f"this DiffusionLLM is that of process {self._pid}, which forked: make one here")
        if self._engine is None:
            raise CfgPluginError("this DiffusionLLM is closed")
        if self._died:
            raise CfgPluginError(_ENGINE_DIED)
        return self._engine

    def close(self) -> None:
        """Stop the engine and its processes, when the calls that run have ended; may be called again."""
        if os.getpid() == self._pid:
            with self._lock:
                self._engine = None
                self._finalizer()

    def __enter__(self) -> DiffusionLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _stop(engine: LLMEngine, pid: int) -> None:
    if os.getpid() != pid:  # the end of a forked process
        return
    engine.renderer.shutdown()
    engine.engine_core.shutdown()
    end_output_thread(engine.engine_core)


def _spread(params: DiffusionParams | Iterable[DiffusionParams] | None, count: int) -> list[DiffusionParams]:
    """One `DiffusionParams` per prompt."""
    if params is None:
        params = DiffusionParams()
    if isinstance(params, DiffusionParams):
        return [params] * count
    several = list(params) if isinstance(params, Iterable) else [params]
    if not all(isinstance(item, DiffusionParams) for item in several):
        raise InvalidRequestError("params", params, "a DiffusionParams, or several")
    if len(several) != count:
        raise InvalidRequestError("params", several, f"one DiffusionParams, or as many as there are prompts ({count})")
    return several


def _unpack(prompt: Any, params: DiffusionParams) -> tuple[Any, DiffusionParams]:
    """The text of a prompt, and the parameters with its negative prompt."""
    if not isinstance(prompt, Mapping):
        return prompt, params
    if "prompt" not in prompt or not set(prompt) <= set(_PROMPT_KEYS):
        raise InvalidRequestError(
            "prompt", dict(prompt), f"a text, or a mapping with keys of {', '.join(_PROMPT_KEYS)}"
        )
    if "negative_prompt" in prompt:
        params = msgspec.structs.replace(params, negative_prompt=prompt["negative_prompt"])
    return prompt["prompt"], params


def _finish(entry: _Running, output: Any) -> None:
    try:
        done = read_output(output, 1000 * (time.perf_counter() - entry.started))
    except CfgPluginError as error:
        entry.error = str(error)
    else:
        entry.pictures, entry.metrics = [Image.fromarray(pixels) for pixels in done.pixels], done.metrics


def _output(info: PipelineInfo, request_id: str, text: str, entries: list[_Running]) -> DiffusionOutput:
    for entry in entries:
        if not entry.pictures:  # what is known without the engine
            request = entry.request
            entry.metrics = RequestMetrics(seed=request.seed, guided=request.guided, guidance_off=request.guidance_off)
    results = [entry.pictures for entry in entries if entry.pictures]
    is_video = info.produces == "video"
    return DiffusionOutput(
        request_id=request_id,
        prompt=text,
        images=[] if is_video else list(itertools.chain.from_iterable(results)),
        videos=results if is_video else [],
        fps=info.fps,
        error="; ".join(entry.error for entry in entries if entry.error) or None,
        image_metrics=[entry.metrics for entry in entries],
    )


@contextmanager
def _children_ignore_ctrl_c() -> Iterator[None]:
    """Processes started inside inherit a blocked SIGINT.

    A terminal sends Ctrl-C to the whole process group; an engine that got it too would stop, where only the running
    `generate` should. Ours is delivered when the block ends.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
