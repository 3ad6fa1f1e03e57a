"""Small checkpoints, and the time that a server may take to start."""

from pathlib import Path

import pytest

from tests.model_builders.longcat_image import build_longcat_image_edit
from tests.model_builders.qwen_image import build_qwen_image
from tests.model_builders.wan import build_wan

START_TIMEOUT_S = 180


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A random-weight Qwen-Image."""
    return build_qwen_image(tmp_path_factory.mktemp("model") / "tiny", size="tiny", seed=0)


@pytest.fixture(scope="session")
def edit_model(tmp_path_factory) -> Path:
    return build_longcat_image_edit(tmp_path_factory.mktemp("edit") / "model")


@pytest.fixture(scope="session")
def video_model(tmp_path_factory) -> Path:
    return build_wan(tmp_path_factory.mktemp("wan") / "model", "2.1")
