"""Engine arguments for offline use."""

import pytest

from vllm_cfg_plugin.config import diffusion_engine_args
from vllm_cfg_plugin.errors import ConfigurationError


def test_the_callers_arguments_win_over_our_defaults(qwen_image_folders):
    model = str(qwen_image_folders["tiny"])
    args = diffusion_engine_args(model, 3, max_num_seqs=2, additional_config={"max_image_pixels": 4096})
    assert (args["model"], args["max_num_seqs"], args["dtype"]) == (model, 2, "float32")
    assert args["additional_config"]["cfg_parallel_size"] == 3
    assert args["additional_config"]["max_image_pixels"] == 4096


def test_running_requests_may_finish_at_shutdown_unless_the_caller_says_otherwise(qwen_image_folders):
    model = str(qwen_image_folders["tiny"])
    assert diffusion_engine_args(model, 1)["shutdown_timeout"] == 5
    assert diffusion_engine_args(model, 1, shutdown_timeout=0)["shutdown_timeout"] == 0


@pytest.mark.parametrize("size", [0, -1, "2"])
def test_a_wrong_cfg_size_is_refused(qwen_image_folders, size):
    with pytest.raises(ConfigurationError, match="cfg_parallel_size"):
        diffusion_engine_args(str(qwen_image_folders["tiny"]), size)


def test_vllm_plugins_without_us_is_said_clearly(qwen_image_folders, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another_plugin")
    with pytest.raises(ConfigurationError, match="add vllm_cfg_plugin to it, or unset it"):
        diffusion_engine_args(str(qwen_image_folders["tiny"]), 2)
