"""Ranks that share weights map the same pages, and draw the same images as ranks with a copy each."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.model_builders.qwen_image import ModelSize, build_qwen_image, transformer
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

pytestmark = pytest.mark.e2e

PARAMS = DiffusionParams(height=64, width=64, num_inference_steps=3, true_cfg_scale=3.0, negative_prompt="", seed=5)


@pytest.fixture(scope="module")
def heavy_model(tmp_path_factory) -> Path:
    """40 MB of float32 weights from a bfloat16 file, whose own pages can't be what the ranks share."""
    folder = build_qwen_image(tmp_path_factory.mktemp("heavy") / "model")
    weights = transformer(ModelSize(heads=4, head_dim=64, rope_axes=(16, 24, 24), layers=4))
    weights.to(torch.bfloat16).save_pretrained(folder / "transformer")
    return folder


def count_weight_pages(worker) -> tuple[int, int]:
    """Pages of the transformer's weights in this rank: all, and those that no other process maps.

    From /proc/self/pagemap (Linux's admin-guide/mm/pagemap.rst): bit 63 of a page's entry: present; bit 56: exclusive.
    """
    size = os.sysconf("SC_PAGE_SIZE")
    pages = exclusive = 0
    with open("/proc/self/pagemap", "rb") as pagemap:
        for weight in worker.get_model().parameters():
            first, last = weight.data_ptr() // size, (weight.data_ptr() + weight.nbytes - 1) // size
            pagemap.seek(first * 8)
            entries = np.frombuffer(pagemap.read((last - first + 1) * 8), dtype=np.uint64)
            assert (entries >> 63).all(), "a weight that is not in memory"
            pages += len(entries)
            exclusive += int(((entries >> 56) & 1).sum())
    return pages, exclusive


def cache_sizes(worker) -> tuple[int, int]:
    """Most bytes of this rank's caches."""
    beside = worker.runner.beside
    return beside.embeddings._capacity_bytes, beside.conditions._capacity_bytes


def generate(model, **settings) -> tuple[np.ndarray, list[float]]:
    """The image, and the fraction of weight pages of each rank that are its own after having generated it."""
    with DiffusionLLM(str(model), **settings) as llm:
        outputs = [llm.generate("a house", PARAMS, use_tqdm=False)[0] for _ in range(2)]  # ranks take turns at decoding
        counts = llm._engine.collective_rpc(count_weight_pages)
        sizes = llm._engine.collective_rpc(cache_sizes)
    assert set(sizes) == {(settings.get("cfg_cache_bytes", 2**28),) * 2}
    images = [np.asarray(output.images[0]) for output in outputs]
    assert np.array_equal(*images)
    return images[0], [exclusive / pages for pages, exclusive in counts]


def test_ranks_map_the_same_weights_and_draw_the_same_image(heavy_model, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for functions as arguments of collective_rpc
    copied, own_copies = generate(heavy_model, cfg_parallel_size=2, cfg_shared_weights=False, cfg_text_encoder="one")
    assert all(fraction > 0.9 for fraction in own_copies)
    shared, own_shared = generate(heavy_model, cfg_parallel_size=2, cfg_shared_weights=True, cfg_cache_bytes=1000)
    assert all(fraction < 0.05 for fraction in own_shared)
    assert np.array_equal(copied, shared)
    default, own_default = generate(heavy_model, cfg_parallel_size=3)
    assert all(fraction < 0.05 for fraction in own_default)
    assert np.array_equal(copied, default)
