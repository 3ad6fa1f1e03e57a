"""docs/adding_a_pipeline.md tells the truth: its code is the sample's or runs, its commands, names and paths exist."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.contract import make_request
from vllm_cfg_plugin.distributed.cfg_parallel import CFGParallelMixin
from vllm_cfg_plugin.distributed.parallel_state import destroy_model_parallel
from vllm_cfg_plugin.pipelines.base import EnginePipeline

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "adding_a_pipeline.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def quotes():
    """[(path, code)] of the blocks that say which file they are of."""
    matches = (re.match(r"# (\S+\.py)\n(.*)", block, re.DOTALL) for block in blocks("python"))
    return [match.groups() for match in matches if match]


@pytest.mark.parametrize(("path", "code"), quotes())
def test_a_quoted_block_is_the_files_text(path, code):
    assert code in (ROOT / path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def namespace():
    """What the other blocks define, executed in order as one script."""
    defined = {}
    for block in blocks("python"):
        if not block.startswith("# examples"):
            exec(compile(block, "adding_a_pipeline.md", "exec"), defined)
    yield SimpleNamespace(**defined)
    destroy_model_parallel()


def test_there_are_blocks_of_both_kinds(namespace):
    assert len(quotes()) >= 6
    assert {name for name in vars(namespace) if name.endswith("Mixin")} == {
        "CFGParallelMixin",
        "EditMixin",
        "LongCatStyleMixin",
        "StochasticMixin",
        "TwoExpertsMixin",
        "ZeroStarMixin",
    }


class Scheduler:
    def step(self, noise_pred, t, latents, generator=None, return_dict=False):
        drawn = 0 if generator is None else torch.randn(latents.shape, generator=generator)
        return (latents - noise_pred + drawn,)


def guided(pipeline, value, negative, **kwargs):
    shape = (1, 3, 4)
    positive_kwargs, negative_kwargs = ({"value": torch.full(shape, v), **kwargs} for v in (value, negative))
    return pipeline.predict_noise_maybe_with_cfg(True, 3.0, positive_kwargs, negative_kwargs)


def make(mixin, transformer=lambda value: (value,)):
    pipeline = mixin()
    pipeline.transformer, pipeline.scheduler = transformer, Scheduler()
    return pipeline


def test_the_second_expert_predicts_where_it_is_asked_to(namespace):
    pipeline = make(namespace.TwoExpertsMixin)
    ordinary = guided(pipeline, 2.0, 1.0)
    assert torch.equal(guided(pipeline, 2.0, 1.0, current_model=lambda value: (10 * value,)), 10 * ordinary)


def test_longcats_normalization_shortens_and_never_lengthens(namespace):
    pipeline = make(namespace.LongCatStyleMixin)
    torch.testing.assert_close(guided(pipeline, 2.0, 1.0), torch.full((1, 3, 4), 2.0))  # 4 before
    torch.testing.assert_close(guided(pipeline, 2.0, 2.5), torch.full((1, 3, 4), 1.0))  # stays as it is
    noise, combined = torch.full((1, 3, 4), 1.0), torch.full((1, 3, 4), 4.0)
    torch.testing.assert_close(pipeline.cfg_normalize_function(noise, combined, 0.5), combined / 2)


def test_the_other_formula_is_used(namespace):
    noise = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    other = torch.tensor([[[0.5, -2.0], [1.0, 1.0]]])
    pipeline = make(namespace.ZeroStarMixin)
    expected = namespace.guidance.zero_star_guidance(noise, other, 3.0)
    assert torch.equal(pipeline.combine_cfg_noise(noise, other, 3.0), expected)
    assert not torch.equal(expected, CFGParallelMixin().combine_cfg_noise(noise, other, 3.0))


def test_the_noise_schedulers_own_noise_comes_from_the_generator(namespace):
    pipeline = make(namespace.StochasticMixin)
    pipeline.generator = torch.Generator().manual_seed(1)
    zeros = torch.zeros(1, 3)
    expected = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pipeline.scheduler_step_maybe_with_cfg(zeros, torch.tensor(0), zeros, True), expected)


def test_the_edit_loop_keeps_the_image_of_the_latents(namespace):
    pipeline = make(namespace.EditMixin, lambda hidden_states, timestep, shift: (hidden_states + shift,))
    latents = pipeline.diffuse(torch.ones(1, 3, 4), torch.ones(1, 5, 4), {"shift": 1.0}, {"shift": 0.5}, [0, 1], 2.0)
    assert latents.shape == (1, 3, 4)


def test_the_entry_point_is_the_samples():
    (block,) = blocks("toml")
    assert block in (ROOT / "examples" / "custom_pipeline" / "pyproject.toml").read_text(encoding="utf-8")


def test_the_size_of_the_group_is_1_without_torchrun():
    (command,) = (block for block in blocks("bash") if block.startswith("python -c"))
    script = re.fullmatch(r'python -c "(.*)"\n', command).group(1)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\w+(?:/\w+)+\.py\b", TEXT))))
def test_files_exist(path):
    assert (ROOT / path).is_file()


def test_methods_exist_and_no_abstract_one_is_missing():
    named = set(re.findall(r"^\| `(\w+)\(", TEXT, re.MULTILINE))
    assert {name for name in named if not callable(getattr(EnginePipeline, name, None))} == set()
    assert named >= EnginePipeline.__abstractmethods__
    parameters = [*inspect.signature(CFGParallelMixin.predict_noise_maybe_with_cfg).parameters][1:]
    assert f"predict_noise_maybe_with_cfg({', '.join(parameters)})" in TEXT


def test_a_scale_under_another_name_is_refused_in_these_words(qwen_image_folders):
    with pytest.raises(ValueError, match="guidance_scale") as refusal:
        make_request(qwen_image_folders["tiny"], "a cat", guidance_scale=3.5)
    assert str(refusal.value) in TEXT


def test_links_inside_the_page_lead_somewhere():
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", TEXT, re.M)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= headings
