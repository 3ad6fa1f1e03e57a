"""Stable Diffusion 3's packed transformer: 3.0, and 3.5 with its second attention and normalised queries and keys."""

import copy

import pytest
import torch

from tests.model_builders.mmdit import LATENT_CHANNELS, POOLED, sd3_transformer
from tests.model_builders.qwen_image import SIZES
from tests.unit.packed_checks import PackedChecks
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.sd3.transformer import PackedSD3Transformer, patchify, unpatchify

VERSIONS = {"3.0": {}, "3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}}


def grid_of(sequence):
    return tuple(side // 2 for side in sequence["hidden_states"].shape[2:])


class TestPackedSD3(PackedChecks):
    changeable = ("hidden_states", "encoder_hidden_states", "timestep", "pooled_projections")
    hooked = (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.ff_context.net.2",
        "transformer_blocks.1.norm1_context.linear",
        "context_embedder",
        "pos_embed.proj",
        "norm_out.linear",
    )

    @pytest.fixture(scope="class", params=[("tiny", "3.0"), ("odd", "3.5"), ("small", "3.5")])
    @classmethod
    def models(cls, request):
        torch.manual_seed(0)
        size, version = request.param
        reference = sd3_transformer(SIZES[size], **VERSIONS[version])
        return reference, PackedSD3Transformer.adopt(copy.deepcopy(reference))

    def make_sequence(self, grid, text_length):
        return {
            "hidden_states": torch.randn(1, LATENT_CHANNELS, 2 * grid[0], 2 * grid[1]),
            "encoder_hidden_states": torch.randn(1, text_length, 48),
            "pooled_projections": torch.randn(1, POOLED),
            "timestep": 1000 * torch.rand(1),
        }

    def pack(self, sequences):
        return {
            "hidden_states": torch.cat([patchify(s["hidden_states"], 2) for s in sequences], dim=1),
            "encoder_hidden_states": torch.cat([s["encoder_hidden_states"] for s in sequences], dim=1),
            "pooled_projections": torch.cat([s["pooled_projections"] for s in sequences]),
            "timestep": torch.cat([s["timestep"] for s in sequences]),
            "img_shapes": [grid_of(s) for s in sequences],
            "txt_seq_lens": [s["encoder_hidden_states"].shape[1] for s in sequences],
        }

    def unpack(self, prediction, sequences):
        grids = [grid_of(s) for s in sequences]
        rows = prediction.split([height * width for height, width in grids], dim=1)
        return [unpatchify(own, grid, 2) for own, grid in zip(rows, grids, strict=True)]

    @torch.inference_mode()
    def test_rows_that_do_not_fit_are_refused(self, models):
        _, packed = models
        arguments = self.pack([self.make_sequence((2, 2), 3)])
        with pytest.raises(ValueError, match=r"hidden_states has 5 rows.*\[4\] have 4"):
            packed(**arguments | {"hidden_states": torch.randn(1, 5, 16)})
        with pytest.raises(ValueError, match=r"encoder_hidden_states has 4 rows.*\[3\] have 3"):
            packed(**arguments | {"encoder_hidden_states": torch.randn(1, 4, 48)})
        with pytest.raises(ValueError, match="have 2 and 1 entries for 1 timesteps"):
            packed(**arguments | {"img_shapes": [(1, 2), (1, 2)]})


def test_patches_are_put_back():
    latents = torch.randn(2, LATENT_CHANNELS, 6, 10)
    tokens = patchify(latents, 2)
    assert tokens.shape == (2, 15, 16)
    assert torch.equal(tokens[0, 6].view(-1, 2, 2), latents[0, :, 2:4, 2:4])
    assert torch.equal(unpatchify(tokens, (3, 5), 2), latents)


def test_an_unknown_normalisation_is_refused():
    reference = sd3_transformer(SIZES["tiny"], qk_norm="layer_norm")
    with pytest.raises(ConfigurationError, match="qk_norm='layer_norm' is not supported"):
        PackedSD3Transformer.adopt(copy.deepcopy(reference))
