"""A small model's description and the answers that its engine would give; shared by the front-end tests."""

from dataclasses import replace

import numpy as np
import torch

from vllm_cfg_plugin.checkpoint import PipelineInfo, TextRules
from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.engine.result import ResultHeader, pack_result
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest, RequestLimits

INFO = PipelineInfo(
    text=TextRules(max_tokens=20),
    cfg_scale="true_cfg_scale",
    size_multiple=8,
    pixels_per_token=8,
    default_params=DiffusionParams(
        height=64, width=64, num_inference_steps=20, true_cfg_scale=4.0, negative_prompt=None
    ),
)
VIDEO_INFO = replace(
    INFO,
    cfg_scale="guidance_scale",
    needs_negative_prompt=False,
    options=frozenset({"num_frames", "guidance_scale_2"}),
    produces="video",
    frames_per_latent=4,
    fps=16,
    default_params=DiffusionParams(height=64, width=64, num_frames=9, num_inference_steps=20, guidance_scale=4.0),
)
IMAGE_TO_VIDEO_INFO = replace(VIDEO_INFO, min_images=1, max_images=1)
LIMITS = RequestLimits(max_image_pixels=256 * 256, max_inference_steps=50)


def fake_pixels(request: DiffusionRequest) -> np.ndarray:
    """An image or a video that shows its seed."""
    generator = np.random.default_rng(request.seed)
    shape = (max(request.num_frames, request.layers), request.height, request.width, 4 if request.layers else 3)
    return generator.integers(0, 256, shape, dtype=np.uint8)


def answer(request: DiffusionRequest) -> torch.Tensor:
    """What the engine returns for a finished request."""
    metrics = RequestMetrics(
        queue_ms=1.0, denoise_ms=10.0, steps=request.num_inference_steps, seed=request.seed, guided=request.guided
    )
    pixels = fake_pixels(request)
    return pack_result(ResultHeader(metrics=metrics, shape=pixels.shape), pixels.tobytes())
