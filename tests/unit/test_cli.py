"""Our flags on vLLM's parser: every spelling ends in `additional_config`, and a diffusers MODEL brings its defaults."""

import json
import os

import pytest
from safetensors.torch import save_file
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.cli import all_plugin_names
from vllm_cfg_plugin.config import ENGINE_DEFAULTS, FIND_TOKEN_BUDGET, EngineSettings
from vllm_cfg_plugin.errors import ConfigurationError


@pytest.fixture(scope="module")
def parser():
    top = FlexibleArgumentParser()
    make_arg_parser(top.add_subparsers().add_parser("serve"))
    return top


@pytest.fixture
def parse(parser, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return lambda *args: parser.parse_args(["serve", *map(str, args)])


@pytest.fixture
def model(qwen_image_folders):
    return qwen_image_folders["tiny"]


SPELLINGS = [
    ["--cfg-parallel-size", "2"],
    ["--cfg-parallel-size=2"],
    ["--cfg_parallel_size", "2"],
    ["--additional-config.cfg_parallel_size", "2"],
    ["--additional-config", '{"cfg_parallel_size": 2}'],
    ["--additional-config", '{"max_image_pixels": 1}', "--cfg-parallel-size", "2"],
    ["--cfg-parallel-size", "2", "--additional-config", '{"max_image_pixels": 1}'],
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("model_first", [True, False])
def test_every_spelling_reaches_the_engine(parse, model, spelling, model_first):
    args = parse(*([model, *spelling] if model_first else [*spelling, model]))
    engine_args = AsyncEngineArgs.from_cli_args(args)
    assert engine_args.additional_config["cfg_parallel_size"] == 2
    asked = any("max_image_pixels" in part for part in spelling)
    assert ("max_image_pixels" in engine_args.additional_config) == asked


@pytest.mark.parametrize("config_first", [True, False])
def test_a_flag_and_a_config_that_differ_are_refused_in_either_order(parse, model, config_first, capsys):
    flag, config = ["--cfg-parallel-size", "3"], ["--additional-config", '{"cfg_parallel_size": 2}']
    with pytest.raises(SystemExit):
        parse(model, *(config + flag if config_first else flag + config))
    assert capsys.readouterr().err.endswith(
        "error: cfg_parallel_size=3 is not valid: --additional-config says 2; give one\n"
    )


SWITCH_SPELLINGS = [
    (["--cfg-shared-weights"], True),
    (["--cfg_shared_weights"], True),
    (["--no-cfg-shared-weights"], False),
    (["--no_cfg_shared_weights"], False),
    (["--additional-config", '{"cfg_shared_weights": false}'], False),
    (["--no-cfg-shared-weights", "--cfg-shared-weights", "--cfg-parallel-size", "2"], True),
]


@pytest.mark.parametrize(("spelling", "value"), SWITCH_SPELLINGS)
@pytest.mark.parametrize("model_first", [True, False])
def test_a_switch_reaches_the_engine(parse, model, spelling, value, model_first):
    args = parse(*([model, *spelling] if model_first else [*spelling, model]))
    assert AsyncEngineArgs.from_cli_args(args).additional_config["cfg_shared_weights"] is value


def test_a_switch_with_another_model_is_one_clear_line(parse, capsys, tmp_path):
    """A switch with a model that is not ours is one clear line."""
    assert "is not a diffusers checkpoint" in rejected(parse, capsys, tmp_path, "--cfg-shared-weights")


def test_a_yaml_config_file_works_too(parse, model, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("cfg-parallel-size: 3\nmax-num-seqs: 5\n")
    args = parse(model, "--config", file)
    assert args.additional_config["cfg_parallel_size"] == 3
    assert args.max_num_seqs == 5


def test_a_diffusers_model_brings_our_defaults(parse, model):
    args = parse(model)
    assert {name: getattr(args, name) for name in ENGINE_DEFAULTS} == ENGINE_DEFAULTS
    assert args.dtype == "float32"
    assert "vllm_cfg_plugin" in os.environ["VLLM_PLUGINS"].split(",")


def test_every_server_has_a_progress_channel_of_its_own(parse, model):
    addresses = {parse(model).additional_config["progress_address"] for _ in range(2)}
    assert len(addresses) == 2
    given = parse(model, "--additional-config", '{"progress_address": "ipc:///tmp/mine"}')
    assert given.additional_config["progress_address"] == "ipc:///tmp/mine"


@pytest.mark.parametrize("model_first", [True, False])
def test_what_the_user_gives_wins_over_our_defaults(parse, model, model_first):
    flags = [
        "--max-num-seqs",
        "3",
        "--max-num-batched-tokens",
        "777",
        "--dtype",
        "bfloat16",
        "--shutdown-timeout",
        "60",
    ]
    args = parse(*([model, *flags] if model_first else [*flags, model]))
    assert (args.max_num_seqs, args.max_num_batched_tokens, args.dtype) == (3, 777, "bfloat16")
    assert args.shutdown_timeout == 60


VLLMS_OWN_DEFAULTS = [
    (["--shutdown-timeout", "0"], "shutdown_timeout", 0),
    (["--dtype", "auto"], "dtype", "float32"),
    (["--generation-config", "auto"], "generation_config", "auto"),
    (["--config-format", "auto"], "config_format", "diffusers"),
    (["--no-skip-tokenizer-init"], "skip_tokenizer_init", False),
    (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
]


@pytest.mark.parametrize(("flags", "dest", "value"), VLLMS_OWN_DEFAULTS)
def test_vllms_own_default_given_wins_wherever_it_stands(parse, model, flags, dest, value):
    """A flag that says vLLM's own default wins wherever it stands."""
    assert getattr(parse(*flags, model), dest) == value
    assert getattr(parse(model, *flags), dest) == value


def test_vllms_quantization_is_a_setting_of_ours(parse, model, capsys):
    args = parse(model, "--quantization", "int8", "--cfg-parallel-size", "2")
    assert args.quantization is None, "vLLM would look for its own methods in the checkpoint"
    assert args.additional_config["quantization"] == "int8"
    assert "quantization" not in parse(model).additional_config
    assert "quantization='awq' is not valid: it must be one of fp8, int8" in rejected(
        parse, capsys, model, "--quantization", "awq"
    )


def test_vllms_offload_of_weights_is_a_setting_of_ours(parse, model):
    args = parse(model, "--cpu-offload-gb", "1.5")
    assert args.cpu_offload_gb == 0, "vLLM's own loader is not at work"
    assert args.additional_config["cpu_offload_gb"] == 1.5
    assert "cpu_offload_gb" not in parse(model).additional_config


def test_vllms_options_of_adapters_are_settings_of_ours(parse, model, tmp_path, capsys):
    path = str(tmp_path / "pixel.safetensors")
    save_file({}, path)
    flags = ["--enable-lora", "--max-loras", "4", "--max-lora-rank", "64", "--max-cpu-loras", "8"]
    args = parse(model, *flags, "--lora-modules", f"pixel={path}")
    asked = {"max_loras": 4, "max_lora_rank": 64, "max_cpu_loras": 8, "lora_modules": {"pixel": path}}
    assert {name: args.additional_config[name] for name in ("enable_lora", *asked)} == {"enable_lora": True, **asked}
    of_vllm = [args.enable_lora, args.lora_modules]
    assert not any(of_vllm), "vLLM would look for layers of language models"
    assert not {"enable_lora", *asked} & set(parse(model).additional_config)
    for wrong, message in (
        (["--lora-modules", f"pixel={path}"], "lora_modules={'pixel': "),
        (["--enable-lora", "--lora-modules", "ink=/none"], "adapter 'ink': there is no file or folder /none"),
        (["--enable-lora", "--lora-modules", f"a={path}", f"a={path}"], "there are two adapters named 'a'"),
        (["--enable-lora", "--max-loras", "4", "--max-cpu-loras", "2"], "max_cpu_loras=2 is not valid"),
        (["--enable-lora", "--max-loras", "0"], "max_loras=0 is not valid"),
        (["--enable-lora", "--lora-modules", f"a={path}", "--served-model-name", "a"], "'a' is the name of the model"),
    ):
        assert message in rejected(parse, capsys, model, *wrong)


def test_vllms_tensor_parallel_size_is_a_setting_of_ours(parse, model, capsys):
    args = parse(model, "--tensor-parallel-size", "2")
    assert args.tensor_parallel_size == 1, (
        "vLLM would look for heads in the checkpoint's placeholder of a configuration"
    )
    assert args.additional_config["tensor_parallel_size"] == 2
    assert "tensor_parallel_size" not in parse(model).additional_config
    for flags, why in (
        ([], "tensor_parallel_size=4 is not valid: it must divide the 2 attention heads"),
        (["--enable-lora"], "enable_lora=True is not valid with tensor_parallel_size=4"),
        (["--sequence-parallel-size", "2"], "sequence_parallel_size=2 x tensor_parallel_size=4 is not valid: it must"),
    ):
        assert why in rejected(parse, capsys, model, "--tensor-parallel-size", "4", *flags)


UNUSABLE = [
    ["--pipeline-parallel-size", "2"],
    ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
    ["--max-model-len", "4096"],
]


@pytest.mark.parametrize("flags", UNUSABLE)
def test_an_option_without_a_use_is_one_clear_line(parse, capsys, model, flags):
    name = flags[0][2:].replace("-", "_")
    line = rejected(parse, capsys, model, *flags)
    assert f"error: {name}=" in line
    assert "leave it out (" in line
    assert line == rejected(parse, capsys, *flags, model)


def test_vllms_own_default_of_an_option_without_a_use_is_no_wish(parse, model):
    parse(model, "--tensor-parallel-size", "1", "--no-enable-lora", "--load-format", "auto")


@pytest.mark.parametrize("revision_first", [True, False])
def test_the_revision_is_asked_wherever_it_stands(parse, monkeypatch, revision_first):
    seen = set()
    monkeypatch.setattr(Checkpoint, "is_diffusers", lambda checkpoint: seen.add(checkpoint.revision))
    flags = ["--revision", "old"]
    parse(*(flags if revision_first else []), "some/model", *([] if revision_first else flags))
    assert seen == {"old"}


def test_what_another_model_leaves_open_is_vllms_default(parse, model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    stock = FlexibleArgumentParser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_cfg_plugin.cli.add_flags", lambda *args, **kwargs: None)
        make_arg_parser(stock)
    assert vars(parse(tmp_path)) == vars(stock.parse_args([str(tmp_path)]))


@pytest.mark.parametrize("asked", [None, 777])
@pytest.mark.parametrize("source", ["before", "after", "yaml"])
def test_the_users_token_budget_is_told_from_the_one_to_find(parse, model, tmp_path, source, asked):
    flag = [] if asked is None else ["--max-num-batched-tokens", asked]
    file = tmp_path / "serve.yaml"
    file.write_text("max-num-seqs: 5\n" + ("" if asked is None else f"max-num-batched-tokens: {asked}\n"))
    arguments = {"before": [*flag, model], "after": [model, *flag], "yaml": [model, "--config", file]}[source]
    tokens = AsyncEngineArgs.from_cli_args(parse(*arguments)).max_num_batched_tokens
    assert tokens == (FIND_TOKEN_BUDGET if asked is None else asked)


def test_another_model_is_left_alone(parse, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    args = parse(tmp_path)
    assert args.config_format == "auto"
    assert args.dtype == "auto"
    assert args.max_num_batched_tokens is None
    assert "VLLM_PLUGINS" not in os.environ


def rejected(parse, capsys, *args):
    with pytest.raises(SystemExit) as exit:
        parse(*args)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()  # and not vLLM's 300 lines of usage
    return line


@pytest.mark.parametrize("size", ["0", "-1", "two", "1.5"])
def test_a_wrong_cfg_size_is_one_clear_line(parse, capsys, model, size):
    line = rejected(parse, capsys, model, "--cfg-parallel-size", size)
    assert f"--cfg-parallel-size: '{size}' is not valid: it must be an integer from 1 up" in line


def test_a_wrong_setting_in_json_is_one_clear_line(parse, capsys, model):
    line = rejected(parse, capsys, model, "--additional-config", '{"cfg_parallel_size": 0}')
    assert "cfg_parallel_size=0 is not valid" in line


@pytest.mark.parametrize("value", ["[]", '"x"', "3"])
def test_additional_config_that_is_no_object_is_one_clear_line(parse, capsys, model, value):
    line = rejected(parse, capsys, model, "--additional-config", value)
    assert f"--additional-config takes a JSON object, not {value}" in line.replace("'", "")


def test_a_setting_that_there_is_not_is_one_clear_line(parse, capsys, model):
    line = rejected(parse, capsys, model, "--additional-config", '{"cfg_paralel_size": 2}')
    assert "there is no cfg_paralel_size: did you mean cfg_parallel_size or" in line


LEAST = [("max-num-seqs", 0, 1), ("max-num-queued-reqs", 0, 1), ("shutdown-timeout", -1, 0)]


@pytest.mark.parametrize(("flag", "value", "least"), LEAST)
def test_an_option_of_vllm_below_its_least_is_one_clear_line(parse, capsys, model, flag, value, least):
    line = rejected(parse, capsys, model, f"--{flag}", value)
    assert f"error: {flag.replace('-', '_')}={value} is not valid: it must be an integer from {least} up" in line


def test_a_model_that_is_no_diffusers_folder_is_one_clear_line(parse, capsys, tmp_path):
    line = rejected(parse, capsys, tmp_path, "--cfg-parallel-size", "2")
    assert "is not a diffusers checkpoint" in line
    assert line == rejected(parse, capsys, "--cfg-parallel-size", "2", tmp_path)


def test_a_setting_of_ours_without_a_model_is_one_clear_line(parse, capsys):
    assert "cfg_parallel_size needs a MODEL" in rejected(parse, capsys, "--cfg-parallel-size", "2")


def test_an_unknown_pipeline_class_is_one_clear_line(parse, capsys, tmp_path):
    """An unknown pipeline class is one clear line that lists the known."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SlidePipeline"}))
    line = rejected(parse, capsys, tmp_path)
    assert "SlidePipeline" in line
    assert "QwenImagePipeline" in line


def test_broken_weights_are_one_clear_line(parse, capsys, model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for part in model.iterdir():
        (broken / part.name).symlink_to(part)
    (broken / "transformer").unlink()
    (broken / "transformer").mkdir()
    weights = "diffusion_pytorch_model.safetensors"
    content = (model / "transformer" / weights).read_bytes()
    (broken / "transformer/config.json").write_bytes((model / "transformer/config.json").read_bytes())
    for damaged in (content[: len(content) // 2], content[:5], b"x" * 100):
        (broken / "transformer" / weights).write_bytes(damaged)
        assert f"transformer/{weights} is broken" in rejected(parse, capsys, broken)


def test_all_plugins_stay_allowed_but_the_one_that_downloads():
    """Every installed plugin stays allowed but the one that would opt in to downloads."""
    names = all_plugin_names().split(",")
    assert "vllm_cfg_plugin" in names
    assert "lora_hf_hub_resolver" not in names


def test_settings_refuse_what_makes_no_sense():
    assert EngineSettings.from_dict({"other": 1}) == EngineSettings()
    for wrong in ({"cfg_parallel_size": "2"}, {"max_image_pixels": 0}, {"cfg_shared_weights": 1}):
        with pytest.raises(ConfigurationError):
            EngineSettings.from_dict(wrong)
