"""What the platform does to a configuration, with stand-ins for the machine and the VllmConfig."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vllm_cfg_plugin import platform
from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.platform import CfgPlatform, HostPlatform, _check_device_count


@pytest.fixture(autouse=True)
def start_method(monkeypatch):
    """The variable as the `vllm` command leaves it for a user who did not set it."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setattr(platform, "_users_start_method", None)


def make_config(architecture="QwenImagePipeline", cfg=2, **parallel):
    defaults = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "data_parallel_size": 1,
        "data_parallel_size_local": 1,
        "world_size": 1,
        "assigned_physical_gpu_ids": None,
        "worker_cls": "auto",
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(model="some/model", architectures=[architecture]),
        additional_config={"cfg_parallel_size": cfg},
        parallel_config=SimpleNamespace(**defaults | parallel),
        scheduler_config=SimpleNamespace(scheduler_cls=None, async_scheduling=False),
    )


def test_a_diffusion_model_is_wired_to_our_engine():
    """A diffusion model is wired to our engine and twice is the same as once."""
    config = make_config(cfg=3)
    for _ in range(2):
        CfgPlatform.check_and_update_config(config)
        assert config.parallel_config.world_size == 3
        assert config.parallel_config.distributed_executor_backend.endswith("CfgExecutor")
        assert config.scheduler_config.async_scheduling


@pytest.mark.parametrize("name", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_other_parallelism_is_refused_by_name(name):
    with pytest.raises(ConfigurationError, match=f"{name}=2 is not valid"):
        CfgPlatform.check_and_update_config(make_config(**{name: 2}))


@pytest.mark.parametrize(("ranks", "replicas", "gpus", "enough"), [(2, 1, 2, True), (2, 1, 1, False), (2, 2, 3, False)])
def test_fewer_gpus_than_ranks_is_one_clear_line(ranks, replicas, gpus, enough):
    platform = SimpleNamespace(device_type="cuda", device_count=lambda: gpus)
    config = make_config(world_size=ranks, data_parallel_size_local=replicas)
    if enough:
        _check_device_count(platform, config)
    else:
        with pytest.raises(ConfigurationError, match=f"needs {ranks * replicas} GPUs and this machine has {gpus}"):
            _check_device_count(platform, config)


def test_fewer_named_gpus_than_ranks_is_one_clear_line():
    config = make_config(world_size=2, assigned_physical_gpu_ids=[3])
    with pytest.raises(ConfigurationError, match="needs 2 GPUs and --device-ids names 1"):
        _check_device_count(SimpleNamespace(device_type="cuda", device_count=lambda: 8), config)


def test_a_cpu_machine_refuses_what_it_cannot_run():
    """A machine without an accelerator refuses what it cannot run."""
    with pytest.raises(ConfigurationError, match="not a diffusion pipeline"):
        HostPlatform.check_and_update_config(make_config("LlamaForCausalLM"))


@pytest.mark.parametrize(
    ("users_choice", "replicas", "method"), [(None, 1, "fork"), (None, 2, "spawn"), ("spawn", 1, "spawn")]
)
def test_the_engine_is_forked_unless_user_or_replicas_forbid(monkeypatch, users_choice, replicas, method):
    monkeypatch.setattr(platform, "_users_start_method", users_choice)
    monkeypatch.setattr(CfgPlatform, "device_type", "cpu")
    CfgPlatform.check_and_update_config(make_config(data_parallel_size=replicas))
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == method


def test_the_platform_sees_the_users_start_method():
    """The platform sees the user's start method before the vllm command sets its own."""
    script = (
        "import vllm.entrypoints.cli.serve, sys, os;"
        "platform = sys.modules['vllm_cfg_plugin.platform'];"
        "print(platform._users_start_method, os.environ.get('VLLM_WORKER_MULTIPROC_METHOD'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_WORKER_MULTIPROC_METHOD"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split()[-2:] == ["None", "None"]


@pytest.mark.parametrize(
    ("setting", "device", "shared"),
    [(None, "cpu", True), (True, "cpu", True), (False, "cpu", False), (None, "cuda", False), (False, "cuda", False)],
)
def test_weights_are_shared_wherever_that_is_possible(setting, device, shared):
    assert EngineSettings(cfg_shared_weights=setting).shares_weights(device) is shared


def test_shared_weights_are_refused_where_they_would_do_nothing(monkeypatch):
    config = make_config()
    config.additional_config["cfg_shared_weights"] = True
    CfgPlatform.check_and_update_config(config)
    monkeypatch.setattr(CfgPlatform, "device_type", "xpu")
    with pytest.raises(ConfigurationError, match="cfg_shared_weights=True is not valid on xpu"):
        CfgPlatform.check_and_update_config(config)
