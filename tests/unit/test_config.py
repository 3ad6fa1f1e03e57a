"""Engine arguments for offline use, and the token budget that they leave open or set."""

import inspect
from types import SimpleNamespace

import pytest
from vllm.config import scheduler
from vllm.engine.arg_utils import EngineArgs

from vllm_cfg_plugin.config import FIND_TOKEN_BUDGET, UNUSABLE_OPTIONS, EngineSettings
from vllm_cfg_plugin.engine import calibration
from vllm_cfg_plugin.engine.calibration import Calibration, keep_calibration, max_side_us, max_step_us, token_budget
from vllm_cfg_plugin.engine.cost import UNCALIBRATED, CostModel
from vllm_cfg_plugin.entrypoints.engine_args import diffusion_engine_args
from vllm_cfg_plugin.entrypoints.llm import DiffusionLLM
from vllm_cfg_plugin.errors import ConfigurationError


def test_the_callers_arguments_win_over_our_defaults(qwen_image_folders):
    model = str(qwen_image_folders["tiny"])
    args = diffusion_engine_args(model, 3, max_num_seqs=2, additional_config={"max_image_pixels": 4096})
    assert (args["model"], args["max_num_seqs"], args["dtype"]) == (model, 2, "float32")
    assert args["additional_config"]["cfg_parallel_size"] == 3
    assert args["additional_config"]["max_image_pixels"] == 4096


def test_our_settings_may_be_given_beside_vllms_arguments(qwen_image_folders):
    args = diffusion_engine_args(str(qwen_image_folders["tiny"]), 2, cfg_shared_weights=False, max_num_seqs=2)
    assert args["additional_config"]["cfg_shared_weights"] is False
    assert "cfg_shared_weights" not in args
    with pytest.raises(ConfigurationError, match="cfg_shared_weights"):
        diffusion_engine_args(str(qwen_image_folders["tiny"]), 2, cfg_shared_weights="yes")


def test_an_option_without_a_use_is_refused(qwen_image_folders):
    model = str(qwen_image_folders["tiny"])
    diffusion_engine_args(model, 1, tensor_parallel_size=1, hf_overrides={}, quantization=None)
    for name, value in {"load_format": "pt", "speculative_config": {"method": "ngram"}, "seed": 3}.items():
        with pytest.raises(ConfigurationError, match=f"{name}=.* leave it out"):
            diffusion_engine_args(model, 1, **{name: value})


WRONG_ARGUMENTS = [
    ({"bogus": 1}, r"^DiffusionLLM: there is no bogus$"),
    ({"cfg_shared_weight": True}, "no cfg_shared_weight: did you mean cfg_shared_weights"),
    ({"max_num_sequences": 4}, "no max_num_sequences: did you mean max_num_seqs"),
    ({"max_num_seqs": 0}, "max_num_seqs=0 is not valid: it must be an integer from 1 up"),
    ({"additional_config": [1]}, r"additional_config=\[1\] is not valid"),
    ({"additional_config": {"cfg_max_restart": 1}}, "additional_config: there is no cfg_max_restart: did you mean"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG_ARGUMENTS)
def test_a_wrong_argument_is_named_with_those_that_are_alike(qwen_image_folders, arguments, said):
    with pytest.raises(ConfigurationError, match=said):
        diffusion_engine_args(str(qwen_image_folders["tiny"]), 1, **arguments)


@pytest.mark.parametrize("name", UNUSABLE_OPTIONS)
def test_every_option_without_a_use_is_one_of_vllms(name):
    assert name in EngineArgs.__dataclass_fields__


def test_auto_leaves_the_dtype_to_us(qwen_image_folders):
    assert diffusion_engine_args(str(qwen_image_folders["tiny"]), 1, dtype="auto")["dtype"] == "float32"


def test_running_requests_may_finish_at_shutdown(qwen_image_folders):
    """Running requests may finish at shutdown unless the caller says otherwise."""
    model = str(qwen_image_folders["tiny"])
    assert diffusion_engine_args(model, 1)["shutdown_timeout"] == 5
    assert diffusion_engine_args(model, 1, shutdown_timeout=0)["shutdown_timeout"] == 0


def test_the_default_cfg_size_is_one_for_all_uses():
    """The default cfg size is the same offline and on the command line."""
    offline = inspect.signature(DiffusionLLM).parameters["cfg_parallel_size"].default
    assert offline == EngineSettings().cfg_parallel_size == 1


@pytest.mark.parametrize("size", [0, -1, "2"])
def test_a_wrong_cfg_size_is_refused(qwen_image_folders, size):
    with pytest.raises(ConfigurationError, match="cfg_parallel_size"):
        diffusion_engine_args(str(qwen_image_folders["tiny"]), size)


def test_heads_that_a_group_cannot_share_are_refused(qwen_image_folders):
    model = str(qwen_image_folders["tiny"])
    assert diffusion_engine_args(model, 1, sequence_parallel_size=2)["additional_config"]["sequence_parallel_size"] == 2
    with pytest.raises(
        ConfigurationError, match=r"sequence_parallel_size=4 is not valid: it must divide the 2 attention"
    ):
        diffusion_engine_args(model, 1, sequence_parallel_size=4)
    with pytest.raises(ConfigurationError, match="sequence_parallel_size=0 is not valid"):
        diffusion_engine_args(model, 1, sequence_parallel_size=0)


def test_processes_are_named_by_their_cfg_rank():
    assert [EngineSettings(cfg_parallel_size=2).rank_name(process) for process in range(2)] == ["0", "1"]
    settings = EngineSettings(cfg_parallel_size=2, sequence_parallel_size=2)
    assert [settings.rank_name(process) for process in range(4)] == ["0.0", "0.1", "1.0", "1.1"]


def test_vllm_plugins_without_us_is_said_clearly(qwen_image_folders, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another_plugin")
    with pytest.raises(ConfigurationError, match="add vllm_cfg_plugin to it, or unset it"):
        diffusion_engine_args(str(qwen_image_folders["tiny"]), 2)


FOUND = Calibration(cost=UNCALIBRATED, token_budget=1234, default_tokens=16)


def budget_of(model, **engine_args):
    args = diffusion_engine_args(model, 1, **engine_args)
    scheduling = SimpleNamespace(max_num_batched_tokens=args["max_num_batched_tokens"])
    vllm_config = SimpleNamespace(scheduler_config=scheduling, additional_config=args["additional_config"])
    keep_calibration(vllm_config, FOUND)
    return token_budget(vllm_config)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(calibration.logger, "info", lambda text, *args: lines.append(text % args))
    return lines


def test_the_token_budget_is_what_start_up_found_and_is_said(qwen_image_folders, said):
    assert budget_of(str(qwen_image_folders["tiny"])) == 1234
    (line,) = said
    assert line.startswith("Token budget: 1234 tokens per rank and step")


@pytest.mark.parametrize("tokens", [1, 8448, 1_000_000])
def test_the_callers_token_budget_wins(qwen_image_folders, said, tokens):
    assert budget_of(str(qwen_image_folders["tiny"]), max_num_batched_tokens=tokens) == tokens
    assert not said


SLOW = CostModel(
    step_us=10, token_us=100_000, square_us=0, encode_us=0, encode_token_us=0, decode_us=2e6, decode_token_us=200_000
)  # the model's own size takes 1.6 s to forward, and 5.2 s to decode


@pytest.mark.parametrize(
    ("cost", "asked", "step_us", "side_us"),
    [
        (UNCALIBRATED, {}, 1e6, 1e6),
        (UNCALIBRATED, {"max_step_ms": 20}, 20e3, 20e3),
        (SLOW, {}, 10 + 2 * 1.6e6, 5.2e6),
        (SLOW, {"max_step_ms": 20}, 20e3, 5.2e6),
    ],
)
def test_how_long_a_step_may_take(cost, asked, step_us, side_us):
    """A step may take a second or what the model's own size needs or what the operator says."""
    vllm_config = SimpleNamespace(additional_config=asked)
    keep_calibration(vllm_config, Calibration(cost=cost, token_budget=100, default_tokens=16))
    assert max_step_us(vllm_config) == pytest.approx(step_us)
    assert max_side_us(vllm_config) == pytest.approx(side_us, abs=2)


@pytest.mark.parametrize(
    "engine_args", [{}, {"max_num_seqs": 1}, {"max_num_seqs": 1, "max_num_batched_tokens": 90_000}]
)
def test_vllm_takes_the_token_budget_without_a_word(qwen_image_folders, monkeypatch, engine_args):
    """Neither its check against `max_num_seqs` nor the one against its own prompt length means anything here."""
    warnings = []
    monkeypatch.setattr(scheduler.logger, "warning", lambda *args: warnings.append(args))
    args = diffusion_engine_args(str(qwen_image_folders["tiny"]), 1, **engine_args)
    asked = EngineArgs(**args).create_engine_config().scheduler_config.max_num_batched_tokens
    assert asked == engine_args.get("max_num_batched_tokens", FIND_TOKEN_BUDGET)
    assert not warnings
