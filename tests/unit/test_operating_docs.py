"""docs/operating.md is complete and says nothing that is not so: flags, defaults, limits, metrics, errors."""

import inspect
import re
from pathlib import Path

import msgspec
import pytest
from prometheus_client import REGISTRY
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_cfg_plugin import cli, errors
from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.entrypoints import metrics
from vllm_cfg_plugin.entrypoints.error_route import error_body
from vllm_cfg_plugin.errors import CfgPluginError, InvalidRequestError
from vllm_cfg_plugin.params import RequestLimits

TEXT = (Path(__file__).parents[2] / "docs" / "operating.md").read_text(encoding="utf-8")


def rows(heading):
    """The cells of each row of the first table of a section."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def flags_in(text):
    return set(re.findall(r"--[a-z][\w-]*[a-z0-9]", text))


@pytest.fixture(scope="module")
def known_flags():
    parser = make_arg_parser(FlexibleArgumentParser())
    return {flag for action in parser._actions for flag in action.option_strings}


def ours():
    return {f"--{name.replace('_', '-')}" for name in (*cli._FLAGS, *cli._TEXTS, *cli._SWITCHES)}


def test_every_flag_has_a_row():
    described = flags_in(" ".join(row[0] for row in rows("Flags")))
    assert {flag for flag in ours() if not described & {flag, flag.replace("--", "--no-", 1)}} == set()


def test_every_flag_that_is_named_is_one(known_flags):
    tools = {"--gpu"}  # of `python -m vllm_cfg_plugin.memory`
    assert flags_in(TEXT) - known_flags - tools == set()


def test_defaults_are_the_settings():
    settings, checked = EngineSettings(), []
    for row in rows("Flags"):
        names = [flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+) N`", row[0])]
        names = [name for name in names if name in cli._FLAGS and getattr(settings, name) is not None]
        if names:
            assert re.findall(r"\d+", row[-1]) == [str(getattr(settings, name)) for name in names], row[0]
            checked += names
    assert {*msgspec.structs.asdict(RequestLimits()), "cfg_max_restarts", "cfg_step_timeout"} <= set(checked)


def test_every_limit_has_its_cost():
    described = flags_in(" ".join(row[0] for row in rows("What a client may cost")))
    assert {f"--{name.replace('_', '-')}" for name in RequestLimits.__struct_fields__} - described == set()


def test_every_metric_that_is_named_is_one():
    there = {family.name for family in REGISTRY.collect() if family.name.startswith(metrics.PREFIX)}
    assert set(re.findall(r"`(vllm_cfg:\w+)`", TEXT)) == there


def exceptions():
    found = inspect.getmembers(errors, lambda member: inspect.isclass(member) and issubclass(member, CfgPluginError))
    return {name: kind for name, kind in found if name in errors.__all__ and kind is not CfgPluginError}


def test_every_error_has_a_row_with_its_status():
    described = {name: row[0] for row in rows("Errors") for name in re.findall(r"`(\w+Error)`", row[1])}
    assert set(exceptions()) <= set(described)
    for name, kind in exceptions().items():
        error = InvalidRequestError("n", 0, "more") if kind is InvalidRequestError else kind("no luck")
        if described[name]:  # one that HTTP shows
            assert described[name] == str(error_body(error)["error"]["code"]), name
