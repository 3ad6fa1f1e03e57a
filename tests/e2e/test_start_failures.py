"""What can't be served ends `vllm serve` with one clear line, a non-zero exit code and no orphans."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from examples.vllm_server import VllmServer
from tests.e2e.server import Footprint
from vllm_cfg_plugin import DiffusionLLM
from vllm_cfg_plugin.errors import ConfigurationError

pytestmark = pytest.mark.e2e

EXIT_TIMEOUT_S = 120


def failed_start(model: Path, options: list[str], folder: Path, env: dict[str, str] | None = None) -> str:
    """Everything that the server printed before it gave up."""
    with VllmServer(model, options, folder / "server.log", env) as server:
        code = server.process.wait(EXIT_TIMEOUT_S)
        footprint = Footprint(session_id=server.process.pid)
    assert code != 0
    assert footprint.leftovers() == []
    return server.log_tail(lines=10_000)


def the_line(log: str, *needles: str) -> str:
    """The one line that says it all."""
    lines = [line for line in log.splitlines() if all(needle in line for needle in needles)]
    assert lines, log[-3000:]
    assert "Traceback" not in log
    return lines[-1]


@pytest.fixture
def copied(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copied"))


def test_an_unknown_pipeline_class_names_the_known_ones(copied, tmp_path):
    index = copied / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "NoSuchPipeline"}))
    log = failed_start(copied, ["--cfg-parallel-size", "2"], tmp_path)
    the_line(log, "NoSuchPipeline", "QwenImagePipeline")


def test_a_folder_that_is_no_diffusers_checkpoint(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    the_line(failed_start(empty, ["--cfg-parallel-size", "2"], tmp_path), str(empty), "not a diffusers checkpoint")


def test_broken_weights(copied, tmp_path):
    weights = next((copied / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    the_line(failed_start(copied, ["--cfg-parallel-size", "2"], tmp_path), weights.name, "broken")


def test_a_cfg_parallel_size_of_zero(model, tmp_path):
    the_line(failed_start(model, ["--cfg-parallel-size", "0"], tmp_path), "cfg", "0", "from 1")


@pytest.mark.parametrize(("size", "shared", "who"), [(1, True, ""), (2, True, ""), (2, False, "cfg rank [01] .*: ")])
def test_offline_the_exception_says_why(copied, size, shared, who):
    """The first two fail in the engine's process, which loads for its ranks, the last one in a rank."""
    weights = next((copied / "text_encoder").glob("*.safetensors"))
    tensors = {name: tensor.new_zeros(1) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})  # whole, so that it takes loading to find out
    with pytest.raises(ConfigurationError, match=f"^the engine could not start: {who}RuntimeError: .*size"):
        DiffusionLLM(str(copied), cfg_parallel_size=size, cfg_shared_weights=shared)


def test_plugins_chosen_without_us(model, tmp_path):
    """None of our code runs then, so the words are vLLM's own; offline we can say more (tests/unit/test_config.py)."""
    log = failed_start(model, ["--cfg-parallel-size", "2"], tmp_path, {"VLLM_PLUGINS": "another_plugin"})
    assert log.splitlines()[-1].startswith("RuntimeError: Failed to infer device type")
