"""What can't be served ends `vllm serve` with one clear line, a non-zero exit code and no orphans."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from examples.vllm_server import VllmServer
from tests.e2e.server import Footprint
from vllm_cfg_plugin import DiffusionLLM
from vllm_cfg_plugin.errors import ConfigurationError

pytestmark = pytest.mark.e2e

EXIT_TIMEOUT_S = 120
TWO_RANKS = ["--cfg-parallel-size", "2"]


def with_an_unknown_class(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "NoSuchPipeline"}))


def with_broken_weights(folder: Path) -> None:
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])


def with_weights_of_another_size(folder: Path) -> None:
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    tensors = {name: tensor.new_zeros(1) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})  # whole, so that it takes loading to find out


def with_nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


# What is done to a copy of the checkpoint, the options, and what the one line names.
STARTS = {
    "an unknown pipeline class": (with_an_unknown_class, TWO_RANKS, ("NoSuchPipeline", "QwenImagePipeline")),
    "no diffusers checkpoint": (with_nothing, TWO_RANKS, ("/no diffusers checkpoint", "not a diffusers checkpoint")),
    "broken weights": (with_broken_weights, TWO_RANKS, (".safetensors", "broken")),
    "weights of another size": (with_weights_of_another_size, TWO_RANKS, ("the engine could not start", "size")),
    "a cfg_parallel_size of 0": (lambda folder: None, ["--cfg-parallel-size", "0"], ("cfg", "0", "from 1")),
}


@pytest.fixture(scope="module")
def failed_starts(model, tmp_path_factory) -> dict[str, tuple[int, int, str]]:
    """Name -> (process id, exit code, all that it printed)."""
    root = tmp_path_factory.mktemp("starts")
    command = [sys.executable, str(Path(__file__).with_name("forked_serve.py"))]
    for name, (spoil, options, _) in STARTS.items():
        spoil(Path(shutil.copytree(model, root / name)))
        command += [str(root / f"{name}.log"), str(root / name), *options, "--"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=EXIT_TIMEOUT_S, check=True)
    codes = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    logs = [(root / f"{name}.log").read_text(errors="replace") for name in STARTS]
    return {name: (*code, log) for name, code, log in zip(STARTS, codes, logs, strict=True)}


@pytest.mark.parametrize("name", STARTS)
def test_one_line_says_why_and_nothing_is_left(failed_starts, name):
    pid, code, log = failed_starts[name]
    assert code > 0
    assert Footprint(session_id=pid).leftovers() == []
    assert all(needle in log.splitlines()[-1] for needle in STARTS[name][2]), log[-3000:]
    assert ("Traceback" in log) == (name == "weights of another size"), "that one fails in the engine, as a bug may"


@pytest.fixture
def copied(model, tmp_path) -> Path:
    """A checkpoint to be spoiled."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.mark.parametrize(("size", "shared", "who"), [(1, True, ""), (2, True, ""), (2, False, "cfg rank [01] .*: ")])
def test_offline_the_exception_says_why(copied, size, shared, who):
    """The first two fail in the engine's process, which loads for its ranks, the last one in a rank."""
    with_weights_of_another_size(copied)
    with pytest.raises(ConfigurationError, match=f"^the engine could not start: {who}RuntimeError: .*size"):
        DiffusionLLM(str(copied), cfg_parallel_size=size, cfg_shared_weights=shared)


def test_a_signal_to_all_processes_ends_a_start(model, tmp_path):
    """As from a terminal, `timeout` or systemd: the engine ends by it too."""
    log = tmp_path / "server.log"
    with VllmServer(model, TWO_RANKS, log) as server:
        deadline = time.monotonic() + EXIT_TIMEOUT_S
        while "Loaded " not in log.read_text(errors="replace") and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(server.process.pid, signal.SIGTERM)
        assert server.process.wait(EXIT_TIMEOUT_S) == 130
    assert Footprint(session_id=server.process.pid).leftovers() == []


def test_plugins_chosen_without_us(model, tmp_path):
    """None of our code runs then, so the words are vLLM's own; offline we can say more (tests/unit/test_config.py)."""
    with VllmServer(model, TWO_RANKS, tmp_path / "server.log", {"VLLM_PLUGINS": "another_plugin"}) as server:
        assert server.process.wait(EXIT_TIMEOUT_S) != 0
    assert Footprint(session_id=server.process.pid).leftovers() == []
    assert server.log_tail(1).startswith("RuntimeError: Failed to infer device type")
