"""docs/models.md tells the truth: every class that is served, with the defaults that its checkpoints describe."""

import re
from pathlib import Path

import pytest
from msgspec import UNSET

from tests.any_pipelines import ANY_PIPELINES, IN_A_ROW
from tests.families import FAMILIES
from vllm_cfg_plugin.checkpoint import DEFAULTS_FILE, Checkpoint
from vllm_cfg_plugin.cli import _FLAGS
from vllm_cfg_plugin.params import COMBINE_RULES
from vllm_cfg_plugin.pipelines import registry

TEXT = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+Pipeline)` \|" + r" (.*?) \|" * 5 + r" ?(.*?) \|$", re.MULTILINE)
ROWS = {row[0]: row[1:] for row in ROW.findall(TEXT)}


def test_every_class_has_a_row():
    assert set(ROWS) == set(registry.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label)
def test_a_row_says_what_a_checkpoint_describes(family, tmp_path):
    folder = family.build(tmp_path / "model")
    (folder / DEFAULTS_FILE).unlink(missing_ok=True)  # which only keeps the tests small
    info = registry.describe(Checkpoint(str(folder)))
    defaults = info.default_params
    task, scale, steps, negative, normalize, further = ROWS[family.class_name]
    assert task == info.task
    assert scale == f"`{info.cfg_scale}` {getattr(defaults, info.cfg_scale):g}"
    assert int(steps) == defaults.num_inference_steps
    assert negative == ("needed" if info.needs_negative_prompt else "or empty")
    assert normalize == ("on" if defaults.cfg_normalize is True else "off")
    for name in [*info.options, *([info.distilled_scale] if info.distilled_scale else [])]:
        default = getattr(defaults, name)
        assert (f"`{name}`" if default is UNSET else f"`{name}` {default:g}") in further


def test_rules_and_limits_are_all_there():
    for rule in COMBINE_RULES:
        assert f"`{rule}`" in TEXT
    for flag in _FLAGS:
        if flag.startswith("max_"):
            assert f"`--{flag.replace('_', '-')}`" in TEXT


def test_pipelines_of_no_family_are_all_there():
    rows = re.findall(r"^\| `(\w+Pipeline)` \| ([a-z-]+) \| ([^|]+) \|$", TEXT, re.MULTILINE)
    shown = {name: branches for name, _, branches in rows}
    assert set(shown) == {family.class_name for family in ANY_PIPELINES}
    assert {name for name, branches in shown.items() if branches == "calls in a row"} == set(IN_A_ROW)
