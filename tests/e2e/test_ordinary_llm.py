"""Invariant 7: an ordinary model's VllmConfig is the same with this plugin and without it.

Both sides pretend to be a machine with vLLM's CPU build, so that stock vLLM has a platform without us.
"""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e

LLM_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}

DUMP_CONFIG = """
import dataclasses, json, os, sys
import vllm.platforms as platforms
platforms.builtin_platform_plugins["cpu"] = lambda: "vllm.platforms.cpu.CpuPlatform"
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

args = make_arg_parser(FlexibleArgumentParser()).parse_args([sys.argv[1], "--max-num-seqs", "7"])
args.model = args.model_tag
config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
fields = {f.name: repr(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name != "instance_id"}
fields["platform"] = type(platforms.current_platform).__name__
fields["hash"] = config.compute_hash()
fields["VLLM_PLUGINS"] = os.environ.get("VLLM_PLUGINS") or None
with open(sys.argv[2], "w") as out:
    json.dump(fields, out)
"""


def test_an_ordinary_models_config_is_equal_without_us(tmp_path):
    """The config of an ordinary model is equal with and without the plugin."""
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text(json.dumps(LLM_CONFIG))
    processes = {}
    for name, plugins in (("with", None), ("without", "")):
        env = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"}
        env |= {} if plugins is None else {"VLLM_PLUGINS": plugins}
        command = [sys.executable, "-c", DUMP_CONFIG, str(tmp_path / "llm"), str(tmp_path / name)]
        processes[name] = subprocess.Popen(command, env=env)
    assert [process.wait(timeout=300) for process in processes.values()] == [0, 0]
    ours, stock = (json.loads((tmp_path / name).read_text()) for name in ("with", "without"))
    assert (ours.pop("platform"), stock.pop("platform")) == ("CfgPlatform", "CpuPlatform")
    assert ours == stock
