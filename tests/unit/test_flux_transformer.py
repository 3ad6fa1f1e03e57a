"""Flux's packed transformer, with and without a guidance embedding."""

import copy

import pytest
import torch

from tests.model_builders.mmdit import POOLED, flux_transformer
from tests.model_builders.qwen_image import SIZES
from tests.unit.packed_checks import PackedIdsChecks, image_ids
from vllm_cfg_plugin.pipelines.flux.transformer import PackedFluxTransformer


class TestPackedFlux(PackedIdsChecks):
    changeable = ("hidden_states", "encoder_hidden_states", "timestep", "pooled_projections")
    hooked = (
        "transformer_blocks.1.attn.to_add_out",
        "single_transformer_blocks.1.proj_mlp",
        "single_transformer_blocks.0.norm.linear",
        "time_text_embed.text_embedder.linear_1",
        "x_embedder",
    )

    @pytest.fixture(scope="class", params=SIZES)
    @classmethod
    def models(cls, request):
        torch.manual_seed(0)
        reference = flux_transformer(SIZES[request.param])
        return reference, PackedFluxTransformer.adopt(copy.deepcopy(reference))

    def make_sequence(self, grid, text_length):
        return {
            "hidden_states": torch.randn(1, grid[0] * grid[1], 16),
            "encoder_hidden_states": torch.randn(1, text_length, 48),
            "pooled_projections": torch.randn(1, POOLED),
            "timestep": torch.rand(1),
            "img_ids": image_ids(grid),
            "txt_ids": torch.zeros(text_length, 3),
        }

    @torch.inference_mode()
    def test_an_embedding_of_guidance_must_fit_the_checkpoint(self, models):
        _, packed = models
        with pytest.raises(ValueError, match=r"guidance.*guidance_embeds=False: it must be None"):
            packed(**self.pack([self.make_sequence((2, 2), 3)]), guidance=torch.tensor([3.5]))


class TestPackedFluxWithGuidance(TestPackedFlux):
    changeable = (*TestPackedFlux.changeable, "guidance")

    @pytest.fixture(scope="class", params=["tiny", "odd"])
    @classmethod
    def models(cls, request):
        torch.manual_seed(0)
        reference = flux_transformer(SIZES[request.param], guidance_embeds=True)
        return reference, PackedFluxTransformer.adopt(copy.deepcopy(reference))

    def make_sequence(self, grid, text_length):
        return super().make_sequence(grid, text_length) | {"guidance": 4 * torch.rand(1)}

    @torch.inference_mode()
    def test_an_embedding_of_guidance_must_fit_the_checkpoint(self, models):
        _, packed = models
        with pytest.raises(ValueError, match=r"guidance=None.*guidance_embeds=True: pass one scale"):
            packed(**self.pack([self.make_sequence((2, 2), 3)]) | {"guidance": None})
