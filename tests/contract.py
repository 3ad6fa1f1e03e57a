"""A pipeline behind the engine's contract, without an engine: requests as the front end makes them, their steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.entrypoints.images.inputs import read_images
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, RequestLimits
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline, generator_of
from vllm_cfg_plugin.pipelines.common.generate import DirectCall, predict
from vllm_cfg_plugin.pipelines.registry import describe
from vllm_cfg_plugin.resolve import resolve_requests
from vllm_cfg_plugin.tokens import TokenCounter


def make_request(
    folder: str | Path, prompt: str, images: Sequence[Image.Image] = (), **params: Any
) -> DiffusionRequest:
    """A request to the model in a folder, as the front end would resolve it."""
    checkpoint, limits = Checkpoint(str(folder)), RequestLimits()
    info = describe(checkpoint)
    extra = {name: params.pop(name) for name in info.extra_fields if name in params}
    inputs = read_images(list(images), "image", limits.max_input_pixels)
    count = TokenCounter.of(checkpoint, info.text)
    return resolve_requests(prompt, DiffusionParams(**params, extra=extra), info, limits, count, inputs)[0]


@torch.inference_mode()
def generate(pipeline: EnginePipeline, request: DiffusionRequest) -> torch.Tensor:
    """What the engine does for one request on one rank; returns its final latents."""
    generator = generator_of(request)
    return DirectCall(pipeline, [request], generator).denoise(pipeline.draw_noise(request, generator))


def branches_of(pipeline: EnginePipeline, request: DiffusionRequest, step: int = 0) -> list[BranchInput]:
    """The branches of a request at a step, on its first latents."""
    latents = pipeline.draw_noise(request, generator_of(request))
    timesteps = pipeline.make_noise_scheduler(request).timesteps
    condition = pipeline.encode_images(request) if request.images else []
    return [
        BranchInput(
            request,
            latents,
            pipeline.encode_branch(request, branch),
            timesteps[step],
            branch,
            condition,
            timesteps[step + 1 :],
        )
        for branch in range(request.branches_at(step))
    ]


@torch.inference_mode()
def assert_packed_is_alone(pipeline: EnginePipeline, requests: Sequence[DiffusionRequest]) -> None:
    """All branches of the requests, at steps of their own, in one forward: bitwise what each gets alone."""
    branches = []
    for i, request in enumerate(requests):
        branches += branches_of(pipeline, request, i % request.num_inference_steps)
    for branch, prediction in zip(branches, predict(pipeline, branches), strict=True):
        assert torch.equal(prediction, predict(pipeline, [branch])[0])
        assert prediction.shape == (1, *pipeline.prediction_shape(branch.request))


@torch.inference_mode()
def assert_tokens_are_counted(pipeline: EnginePipeline, request: DiffusionRequest) -> None:
    """What the front end foretold of each text is what the model sees."""
    lengths = [pipeline.encode_branch(request, branch).tokens.shape[0] for branch in range(len(request.prompts))]
    assert lengths == request.text_tokens


def assert_same_pixels(image: Any, expected: Any) -> None:
    """Two images that are no uniform grey differ by at most one level."""
    image, expected = (np.asarray(each).astype(np.int16) for each in (image, expected))
    assert expected.std() > 20
    assert np.abs(image - expected).max() <= 1
