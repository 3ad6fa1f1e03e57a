"""One thread per process, as on a cfg rank, and the small models that many tests load."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.model_builders.qwen_image import SIZES, build_qwen_image

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def qwen_image_folders(tmp_path_factory):
    """Random-weight checkpoints: size -> folder."""
    root = tmp_path_factory.mktemp("qwen_image")
    return {size: build_qwen_image(root / size, size=size) for size in SIZES}
