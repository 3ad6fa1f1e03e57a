"""Our Flux pipeline against diffusers' own, called directly and through the engine's contract."""

import pytest
import torch
from diffusers import FluxPipeline as DiffusersFluxPipeline

from tests import contract
from tests.model_builders.flux import build_flux
from tests.unit.pipeline_checks import ManyPromptsChecks
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.pipelines.flux import FluxPipeline


class TestFlux(ManyPromptsChecks):
    ours, reference = FluxPipeline, DiffusersFluxPipeline
    scale = "true_cfg_scale"
    guided_without_negative = False

    @pytest.fixture(scope="class", params=["tiny", "odd"])
    @classmethod
    def folder(cls, request, tmp_path_factory):
        return build_flux(tmp_path_factory.mktemp("flux"), size=request.param)

    def test_only_a_distilled_checkpoint_reads_guidance_scale(self, folder):
        with pytest.raises(InvalidRequestError, match=r"guidance_scale=3.5.*this model's guidance scale is true_cfg"):
            self.request_for(folder, guidance_scale=3.5)

    def test_a_prompt_that_is_too_long_is_refused(self, folder):
        with pytest.raises(InvalidRequestError, match="at most 512 tokens"):
            contract.make_request(folder, "a" * 520)


class TestDistilledFlux(ManyPromptsChecks):
    ours, reference = FluxPipeline, DiffusersFluxPipeline
    scale = "true_cfg_scale"
    guided_without_negative = False

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        return build_flux(tmp_path_factory.mktemp("flux"), is_distilled=True)

    @pytest.mark.parametrize("guidance", [{}, {"negative_prompt": "ugly", "true_cfg_scale": 2.0}])
    def test_the_distilled_scale_like_diffusers(self, pipelines, folder, guidance):
        reference, ours = pipelines
        request = self.request_for(folder, guidance_scale=1.5, **guidance)
        latents = contract.generate(ours, request)
        torch.testing.assert_close(latents, self.call(reference, request, guidance_scale=1.5), rtol=0, atol=1e-4)
        assert torch.equal(latents, self.call(ours, request, guidance_scale=1.5))
        assert not torch.equal(latents, self.call(ours, request))
