"""Every option of vLLM's own parser is in one of our tables, so that none is ignored in silence."""

import pytest
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_cfg_plugin.cli import _FLAGS, _SWITCHES, _TEXTS
from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.vllm_options import HARMLESS, REFUSED, WORKING

OURS = {*_FLAGS, *_SWITCHES, *_TEXTS}


@pytest.fixture(scope="module")
def parser():
    top = FlexibleArgumentParser()
    make_arg_parser(top.add_subparsers().add_parser("serve"))
    return top


@pytest.fixture(scope="module")
def options(parser):
    """Those of `vllm serve`: name -> action."""
    (serve,) = parser._subparsers._group_actions
    return {action.dest: action for action in serve.choices["serve"]._actions}


def test_every_option_is_in_a_table(options):
    unknown = options.keys() - WORKING - HARMLESS.keys() - REFUSED.keys() - OURS
    assert not unknown, "say in vllm_options.py what they do: work, change nothing, or are refused"


def test_no_option_is_in_two_tables():
    tables = [WORKING, HARMLESS.keys(), REFUSED.keys(), OURS]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert {*EngineSettings.__struct_fields__} >= OURS


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--block-size=16", "there is no KV cache"),
        ("--max-loras=2", "enable_lora"),
        ("--lora-dtype=float16", "the type that dtype says"),
        ("--tool-call-parser=hermes", "text"),
        ("--attention-backend=FLASH_ATTN", "this plugin's own"),
        ("--collect-detailed-traces=all", "docs/operating.md"),
        ("--distributed-timeout-seconds=9", "cfg_step_timeout"),
        ("--enable-chunked-prefill", ""),
        ("--enforce-eager", ""),
    ],
)
def test_an_option_is_refused_in_one_line_or_changes_nothing(parser, qwen_image_folders, capsys, flag, remedy):
    arguments = ["serve", str(qwen_image_folders["tiny"]), flag]
    if not remedy:
        parser.parse_args(arguments)
        return
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert remedy in line
    assert flag.partition("=")[0].strip("-").replace("-", "_") in line


def test_no_option_of_ours_is_refused_by_its_default(parser, qwen_image_folders):
    parser.parse_args(["serve", str(qwen_image_folders["tiny"])])
