"""Z-Image called directly on two real gloo ranks: bitwise the latents of one rank."""

import itertools

import numpy as np
import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.z_image_models import build_z_image

pytestmark = pytest.mark.distributed


def latents_of_generations(folder):
    """Final latents with guidance, with guidance in the first steps only, and without."""
    from vllm_cfg_plugin.pipelines.z_image import ZImagePipeline

    pipeline = ZImagePipeline.load(folder, dtype=torch.float32, device=torch.device("cpu"))
    latents = []
    for guidance in ({"cfg_normalization": True}, {"cfg_truncation": 0.4}, {"guidance_scale": 0.0}):
        options = {"num_inference_steps": 4, "height": 64, "width": 48, "output_type": "latent"} | guidance
        generator = torch.Generator().manual_seed(1)
        latents.append(pipeline("a red apple", generator=generator, **options).images.numpy())
    return latents


def latents_on_rank(folder):
    from vllm_cfg_plugin.distributed import initialize_model_parallel

    initialize_model_parallel(cfg_parallel_size=2)
    return latents_of_generations(folder)


def test_two_ranks_are_bitwise_one(tmp_path):
    folder = str(build_z_image(tmp_path / "model"))
    alone = latents_of_generations(folder)
    assert all((one != other).any() for one, other in itertools.pairwise(alone))
    for latents in run_ranks(latents_on_rank, 2, folder):
        np.testing.assert_array_equal(latents, alone)
