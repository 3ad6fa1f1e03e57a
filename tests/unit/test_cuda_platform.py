"""On vLLM's own CUDA platform, its questions to the machine answered by hand: devices, groups, how ranks start."""

import json
import os
import subprocess
import sys

import pytest

from tests.model_builders.qwen_image import build_qwen_image
from tests.unit.cuda_machine import GPUS

SERVERS = {
    "two ranks": "--cfg-parallel-size 2",
    "two replicas": "--cfg-parallel-size 2 --data-parallel-size 2",
    "replicas on named devices": "--cfg-parallel-size 2 --data-parallel-size 2 --device-ids 3,1,2,0",
    "more ranks than devices": "--cfg-parallel-size 4 --data-parallel-size 2",
    "more ranks than named devices": "--cfg-parallel-size 2 --device-ids 3",
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    model = build_qwen_image(tmp_path_factory.mktemp("cuda") / "model")
    unset = ("CUDA_VISIBLE_DEVICES", "VLLM_PLUGINS", "VLLM_WORKER_MULTIPROC_METHOD")
    command = [sys.executable, "-m", "tests.unit.cuda_machine", str(model), *SERVERS.values()]
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(SERVERS, map(json.loads, lines), strict=True))


DEVICES = {"two ranks": [0, 1], "two replicas": [0, 1, 2, 3], "replicas on named devices": [3, 1, 2, 0]}


@pytest.mark.parametrize("name", DEVICES)
def test_every_rank_has_a_device_of_its_own_for_all_that_it_does(servers, name):
    names = [f"cuda:{number}" for number in DEVICES[name]]
    for rank, device in zip(servers[name]["ranks"], names, strict=True):
        assert (rank["device"], rank["current"], rank["communicators"]) == (device, [device], device)


@pytest.mark.parametrize("name", DEVICES)
def test_ranks_of_replicas_meet_by_nccl_and_start_by_spawn(servers, name):
    """The ranks of each replica meet by NCCL and start by spawn."""
    server = servers[name]
    assert server["platform"][:2] == ["CfgPlatform", "NonNvmlCudaPlatform"]
    assert (server["dtype"], server["start_method"]) == ("torch.bfloat16", "spawn")
    for number, rank in enumerate(server["ranks"]):
        assert (rank["backend"], rank["world"], rank["cfg_groups"]) == ("nccl", [number % 2, 2], [[0, 1]])


def test_too_few_devices_are_one_clear_line(servers):
    assert f"needs 8 GPUs and this machine has {GPUS}" in servers["more ranks than devices"]["error"]
    assert "needs 2 GPUs and --device-ids names 1" in servers["more ranks than named devices"]["error"]
