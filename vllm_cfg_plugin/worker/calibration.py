"""Times the real pipeline on this rank at start-up and fits the cost model to it; kept on disk for the next start.

All ranks of a host calibrate at the same time, because that is how they will run: a sequence group together. Must not
import vLLM.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from math import ceil
from pathlib import Path

import msgspec
import torch

from vllm_cfg_plugin.checkpoint import DEFAULTS_FILE, Checkpoint, PipelineInfo
from vllm_cfg_plugin.config import PLUGIN_NAME
from vllm_cfg_plugin.distributed.sequence_group import ALONE, SequenceGroup, current_group, together
from vllm_cfg_plugin.engine.calibration import Calibration, MemoryCost
from vllm_cfg_plugin.engine.cost import (
    CostModel,
    find_token_budget,
    fit_forward,
    fit_line,
    fit_non_negative,
)
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline, PromptEmbeds, generator_of, group_branches
from vllm_cfg_plugin.pipelines.quantized import QuantizedLinear
from vllm_cfg_plugin.pipelines.registry import describe, implementation_of
from vllm_cfg_plugin.pipelines.sample_request import blank_embeds, sample_request, sample_requests
from vllm_cfg_plugin.worker.call_calibration import calibrate_calls
from vllm_cfg_plugin.worker.device_memory import device_memory
from vllm_cfg_plugin.worker.stopwatch import Run, Stopwatch

logger = get_logger(__name__)

_PROMPTS = ("a cat", "a photograph of a cat on a chair, " * 8)
_TEMPLATE_CHARACTERS = 200  # about as many as a pipeline puts around a prompt
# Sides of images against those of the model's own size; tokens go with the square.
_FORWARD_SCALES = (0.25, 0.5, 1, 2, 4)
_DECODE_SCALES = (0.25, 0.5, 1, 2)
_MOST_SEQUENCES = 256

_COMPONENTS = ("transformer", "transformer_2", "unet", "vae", "text_encoder")


def calibrate_rank(
    pipeline: EnginePipeline,
    checkpoint: Checkpoint,
    folder: Path,
    ranks: int,
    group: SequenceGroup = ALONE,
    *,
    text_encoder: str = "all",
) -> Calibration:
    """This rank's calibration: from `folder` if an earlier start left it there, measured otherwise.

    Args:
        folder: where calibrations are kept, one file per model, device and software; need not exist.
        ranks: how many run side by side and share what the machine has.
        group: those of them that share this one's forwards.
        text_encoder: where it is, of `TEXT_ENCODERS`; "" where another rank encodes: then encodes cost nothing here.
    """
    path = folder / f"{_key(pipeline, checkpoint, ranks, group, text_encoder)}.json"
    calibration = _load(path)
    (is_missing,) = group.any([calibration is None])
    if calibration is None or is_missing:
        info = describe(checkpoint)
        with together(group):
            if info.call_arguments is None:
                calibration = calibrate(pipeline, info, bool(text_encoder))
            else:
                calibration = calibrate_calls(pipeline, info)
        _store(path, calibration)
    return calibration


@torch.inference_mode()
def calibrate(pipeline: EnginePipeline, info: PipelineInfo, has_text_encoder: bool = True) -> Calibration:
    """Measure encodes, decodes and packed forwards of growing sizes, then all of them again while there is time."""
    device = next(pipeline.transformer.parameters()).device
    memory = device_memory(device)
    stopwatch = Stopwatch(device, current_group(), memory)
    texts: dict[str, PromptEmbeds] = {}
    if has_text_encoder:
        encodes = stopwatch.climb(_encode_runs(pipeline, info, texts))
    else:
        encodes, texts[_PROMPTS[0]] = [], blank_embeds(pipeline, _TEMPLATE_CHARACTERS)
    decodes = stopwatch.climb(_decode_runs(pipeline, sample_requests(info, _DECODE_SCALES)))
    text = texts[_PROMPTS[0]]
    branches = [sample_branch(pipeline, request, text) for request in sample_requests(info, _FORWARD_SCALES)]
    forwards = stopwatch.climb(_forward_run(pipeline, [branch]) for branch in branches)
    default_tokens = sample_branch(pipeline, sample_request(info), text).tokens
    single = max(index for index, run in enumerate(forwards) if index == 0 or run.tokens <= default_tokens)
    packs = stopwatch.climb(_pack_runs(pipeline, branches[single]), [forwards[single]], _has_found_budget)
    stopwatch.repeat_all()
    step_us, token_us, square_us = fit_forward([run.sample for run in forwards + packs[1:]])
    # Where only one text could be measured: what a pipeline wraps a prompt in is most of its work.
    encode_us, encode_token_us = (
        fit_non_negative([(1, embeds.tokens.shape[0]) for embeds in texts.values()], [run.us for run in encodes])
        if encodes
        else (0.0, 0.0)
    )
    decode_us, decode_token_us = fit_line([(run.tokens, run.us) for run in decodes])
    return Calibration(
        cost=CostModel(
            step_us=step_us,
            token_us=token_us,
            square_us=square_us,
            encode_us=encode_us,
            encode_token_us=encode_token_us,
            decode_us=decode_us,
            decode_token_us=decode_token_us,
        ),
        token_budget=max(default_tokens, find_token_budget([run.sample for run in packs])),
        default_tokens=default_tokens,
        memory=None if memory is None else _memory_cost(forwards + packs[1:], decodes, sample_request(info)),
    )


def _memory_cost(forwards: Sequence[Run], decodes: Sequence[Run], default: DiffusionRequest) -> MemoryCost:
    step, token = fit_line([(run.tokens, max(run.nbytes, 1)) for run in forwards])
    decode, decode_token = fit_line([(run.tokens, max(run.nbytes, 1)) for run in decodes])
    return MemoryCost(
        step_bytes=ceil(step),
        token_bytes=ceil(token),
        decode_bytes=ceil(decode + decode_token * default.image_tokens),
        decode_token_bytes=ceil(decode_token),
    )


def _encode_runs(pipeline: EnginePipeline, info: PipelineInfo, texts: dict[str, PromptEmbeds]) -> Iterator[Run]:
    """Encodes of a short and a long text, with images if it must; they leave their embeddings in `texts`."""

    def encode(request: DiffusionRequest) -> None:
        if request.images:
            pipeline.encode_images(request)
        texts[request.prompts[0]] = pipeline.encode_branch(request, 0)

    for prompt in _PROMPTS:
        yield Run(partial(encode, sample_request(info, prompt=prompt)), (_TEMPLATE_CHARACTERS + len(prompt),))


def _decode_runs(pipeline: EnginePipeline, requests: Iterable[DiffusionRequest]) -> Iterator[Run]:
    for request in requests:
        condition = pipeline.encode_images(request) if pipeline.decode_sees_images and request.images else []
        run = partial(pipeline.decode, pipeline.draw_noise(request, generator_of(request)), request, condition)
        yield Run(run, (request.image_tokens,))


def _pack_runs(pipeline: EnginePipeline, branch: BranchInput) -> Iterator[Run]:
    """2, 4, 8, ... of one sequence."""
    count = 2
    while count <= _MOST_SEQUENCES:
        yield _forward_run(pipeline, [branch] * count)
        count *= 2


def _forward_run(pipeline: EnginePipeline, branches: Sequence[BranchInput]) -> Run:
    lengths = tuple(branch.tokens for branch in branches)
    groups = [[branches[position] for position in group] for group in group_branches(pipeline, branches)]

    def forward() -> None:
        with together(current_group()):
            for group in groups:
                pipeline.predict_noise(**pipeline.pack_branches(group))

    return Run(forward, lengths)


def _has_found_budget(packs: Sequence[Run]) -> bool:
    return find_token_budget([run.sample for run in packs]) < packs[-1].tokens


def sample_branch(pipeline: EnginePipeline, request: DiffusionRequest, embeds: PromptEmbeds) -> BranchInput:
    """A branch of a request in its first step."""
    timesteps = pipeline.make_noise_scheduler(request).timesteps
    return BranchInput(
        request=request,
        latents=pipeline.draw_noise(request, generator_of(request)),
        embeds=embeds,
        timestep=timesteps[0],
        condition=pipeline.encode_images(request) if request.images else [],
        timesteps_ahead=timesteps[1:],
    )


def _key(pipeline: EnginePipeline, checkpoint: Checkpoint, ranks: int, group: SequenceGroup, text_encoder: str) -> str:
    """Names everything that the figures depend on."""
    weight, modules = next(pipeline.transformer.parameters()), pipeline.transformer.modules()
    facts = [
        *(checkpoint.read_json(f"{component}/config.json") for component in _COMPONENTS),
        checkpoint.read_json(DEFAULTS_FILE),
        implementation_of(checkpoint),
        torch.cuda.get_device_name(weight.device) if weight.is_cuda else _processor(),
        str(weight.dtype),
        torch.__version__,
        version(PLUGIN_NAME),
        torch.get_num_threads(),
        ranks,
        group.sequence.size,
        group.tensor.size,
        text_encoder,
        next((str(layer.weight.dtype) for layer in modules if isinstance(layer, QuantizedLinear)), ""),
        sum(hasattr(module, "in_host") for module in pipeline.transformer.modules()),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    model = next((line for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def _load(path: Path) -> Calibration | None:
    """An earlier start's calibration; None where there is none that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        logger.debug("Calibration %s can't be read and is measured again: %s", path, error)
        return None


def _store(path: Path, calibration: Calibration) -> None:
    """Write for the next start; several ranks may do so at once, each a whole file."""
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.encode(calibration))
        temporary.replace(path)
    except OSError as error:
        logger.debug("Calibration can't be kept in %s: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
