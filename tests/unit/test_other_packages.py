"""Families of other packages: entry points, found without an edit of ours."""

import logging
import sys

import diffusers
import pytest
import torch

from tests.model_builders.aura_flow import build_aura_flow
from tests.packages import install, install_sample
from vllm_cfg_plugin.checkpoint import MODEL_INDEX, Checkpoint
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines import registry
from vllm_cfg_plugin.pipelines.registry import check_servable, class_names, describe, pipeline_class


@pytest.fixture(scope="module")
def aura_flow(tmp_path_factory):
    return Checkpoint(str(build_aura_flow(tmp_path_factory.mktemp("aura_flow") / "model")))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path, for packages."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._of_other_packages.cache_clear()
    yield tmp_path
    registry._of_other_packages.cache_clear()
    for name in ("aura_flow", "broken_family"):
        sys.modules.pop(name, None)


def test_without_the_package_the_class_runs_as_diffusers_own(aura_flow):
    check_servable(aura_flow)
    assert pipeline_class(aura_flow).diffusers_class is diffusers.AuraFlowPipeline


def test_a_class_that_nobody_has_is_not_served(tmp_path):
    (tmp_path / MODEL_INDEX).write_text('{"_class_name": "AuraFlowVideoPipeline"}')
    with pytest.raises(ConfigurationError, match="AuraFlowVideoPipeline, which this plugin does not serve"):
        check_servable(Checkpoint(str(tmp_path)))


def test_an_installed_family_is_described_and_loaded(aura_flow, site):
    install_sample(site)
    check_servable(aura_flow)
    assert "AuraFlowPipeline" in class_names()
    assert describe(aura_flow).cfg_scale == "guidance_scale"
    pipeline = pipeline_class(aura_flow).load(aura_flow.model, dtype=torch.float32, device=torch.device("cpu"))
    assert type(pipeline).__module__ == "aura_flow"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import a_library_that_is_not_there", "can't be imported: ModuleNotFoundError: .*a_library"),
        ("1 / 0", "can't be imported: ZeroDivisionError"),
        ("", "can't be imported: AttributeError: .*Pipeline"),
        ("class Pipeline: ...", "not a class derived from .*EnginePipeline"),
        ("Pipeline = 3", "not a class derived from .*EnginePipeline"),
        (
            "from vllm_cfg_plugin.pipelines.base import EnginePipeline\nclass Pipeline(EnginePipeline): ...",
            "lacks decode, describe, draw_noise",
        ),
    ],
)
def test_a_family_that_cannot_be_used_names_its_package(aura_flow, site, source, problem):
    (site / "broken_family.py").write_text(source)
    install(site, "some-families", {"AuraFlowPipeline": "broken_family:Pipeline"})
    with pytest.raises(ConfigurationError, match=problem) as refusal:
        check_servable(aura_flow)
    assert "the package some-families" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_two_packages_with_one_class_are_refused(aura_flow, site):
    for name in ("some-families", "others"):
        install(site, name, {"AuraFlowPipeline": f"{name}:Pipeline"})
    with pytest.raises(ConfigurationError, match=r"package (some-families|others) and the package"):
        check_servable(aura_flow)


def test_a_class_of_ours_stays_ours_and_the_log_says_so(qwen_image_folders, site, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    install(site, "some-families", {"QwenImagePipeline": "broken_family:Pipeline"})
    checkpoint = Checkpoint(str(qwen_image_folders["tiny"]))
    check_servable(checkpoint)
    assert pipeline_class(checkpoint).__module__.startswith("vllm_cfg_plugin.pipelines.qwen_image")
    messages = {record.getMessage() for record in caplog.records if record.name.endswith("pipelines.registry")}
    assert messages == {
        "QwenImagePipeline is served by this plugin itself: 'broken_family:Pipeline' of the package some-families is "
        "not used"
    }
