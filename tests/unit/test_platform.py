"""What the platform does to a configuration, with stand-ins for the machine and the VllmConfig."""

from types import SimpleNamespace

import pytest

from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.platform import CfgPlatform, HostPlatform, _check_device_count


def make_config(architecture="QwenImagePipeline", cfg=2, **parallel):
    defaults = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "data_parallel_size_local": 1,
        "world_size": 1,
        "worker_cls": "auto",
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(model="some/model", architectures=[architecture]),
        additional_config={"cfg_parallel_size": cfg},
        parallel_config=SimpleNamespace(**defaults | parallel),
        scheduler_config=SimpleNamespace(scheduler_cls=None, async_scheduling=False),
    )


def test_a_diffusion_model_is_wired_to_our_engine_and_twice_is_the_same_as_once():
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


def test_a_machine_without_an_accelerator_refuses_what_it_cannot_run():
    with pytest.raises(ConfigurationError, match="not a diffusion pipeline"):
        HostPlatform.check_and_update_config(make_config("LlamaForCausalLM"))
