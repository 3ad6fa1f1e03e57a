"""Our Stable Diffusion 3 pipeline against diffusers' own, called directly and through the engine's contract."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline as DiffusersStableDiffusion3Pipeline

from tests import contract
from tests.model_builders.sd3 import build_sd3
from tests.unit.pipeline_checks import ManyPromptsChecks
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.pipelines.sd3 import StableDiffusion3Pipeline

VERSIONS = {
    "3.0": {"is_3_5": False},
    "3.5": {"size": "odd"},
    "3.0 without T5": {"is_3_5": False, "has_t5": False},
}


class TestStableDiffusion3(ManyPromptsChecks):
    ours, reference = StableDiffusion3Pipeline, DiffusersStableDiffusion3Pipeline

    @pytest.fixture(scope="class", params=VERSIONS)
    @classmethod
    def folder(cls, request, tmp_path_factory):
        return build_sd3(tmp_path_factory.mktemp("sd3"), **VERSIONS[request.param])

    @classmethod
    def load_options(cls, folder):
        has_t5 = (folder / "text_encoder_3").exists()
        return {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}

    def test_a_prediction_is_normalised_over_its_channels(self, pipelines):
        _, ours = pipelines
        positive, combined = torch.randn(2, 1, 4, 6, 8)
        normalised = ours.cfg_normalize_function(positive, combined)
        torch.testing.assert_close(normalised.norm(dim=1), positive.norm(dim=1))

    def test_a_size_without_position_embedding_is_refused(self, folder):
        assert self.request_for(folder, height=24 * 8, width=8).image_tokens == 24
        with pytest.raises(InvalidRequestError, match=r"height=200.*at most 192 for this model"):
            self.request_for(folder, height=25 * 8, width=8)


@pytest.mark.parametrize(("has_t5", "most"), [(True, 256), (False, 77)])
def test_a_prompt_that_is_too_long_is_refused(tmp_path, has_t5, most):
    folder = build_sd3(tmp_path, has_t5=has_t5)
    for prompt in ("a " * 300, "a" * 300):
        with pytest.raises(InvalidRequestError, match=f"at most {most} tokens"):
            contract.make_request(folder, prompt)
    assert contract.make_request(folder, "a" * (most - 2)).text_tokens == [333, 333]
