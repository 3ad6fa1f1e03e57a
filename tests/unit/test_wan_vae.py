"""The Wan VAE: diffusers' numbers, also where several threads use it at once."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.model_builders.wan import wan_vae
from vllm_cfg_plugin.pipelines.wan.vae import ThreadSafeWanVAE


@pytest.fixture(params=[False, True], ids=["plain", "residual"])
def vaes(request):
    """(diffusers' VAE, ours over the same weights)"""
    torch.manual_seed(0)
    reference = wan_vae(is_residual=request.param)
    return reference, ThreadSafeWanVAE.adopt(copy.deepcopy(reference))


@torch.inference_mode()
@pytest.mark.parametrize("tiled", [False, True])
def test_threads_do_not_meet(vaes, tiled):
    reference, ours = vaes
    if tiled:
        for vae in vaes:
            vae.enable_tiling(64, 64, 32, 32)
    videos = [torch.randn(1, 3, frames, 96, 64) for frames in (9, 5)]
    latents = [reference.encode(video).latent_dist.mode() for video in videos]
    decoded = [reference.decode(latent).sample for latent in latents]

    @torch.inference_mode()
    def encode(which):
        return torch.equal(ours.encode(videos[which]).latent_dist.mode(), latents[which])

    @torch.inference_mode()
    def decode(which):
        return torch.equal(ours.decode(latents[which], return_dict=False)[0], decoded[which])

    with ThreadPoolExecutor(4) as pool:
        equal = [pool.submit(work, which) for _ in range(5) for work in (encode, decode) for which in (0, 1)]
        assert all(future.result() for future in equal)
