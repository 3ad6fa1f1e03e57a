"""LongCat-Image's packed transformer."""

import copy

import pytest
import torch

from tests.model_builders.mmdit import longcat_image_transformer
from tests.model_builders.qwen_image import SIZES
from tests.unit.packed_checks import PackedIdsChecks, image_ids
from vllm_cfg_plugin.pipelines.longcat_image.transformer import PackedLongCatImageTransformer


@pytest.fixture(scope="module", params=SIZES)
def models(request):
    torch.manual_seed(0)
    reference = longcat_image_transformer(SIZES[request.param])
    return reference, PackedLongCatImageTransformer.adopt(copy.deepcopy(reference))


class TestPackedLongCatImage(PackedIdsChecks):
    changeable = ("hidden_states", "encoder_hidden_states", "timestep")
    hooked = (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.1.ff_context.net.2",
        "transformer_blocks.0.norm1.linear",
        "single_transformer_blocks.0.attn.to_v",
        "single_transformer_blocks.1.proj_mlp",
        "single_transformer_blocks.1.proj_out",
        "single_transformer_blocks.0.norm.linear",
        "context_embedder",
    )

    def make_sequence(self, grid, text_length):
        text_ids = torch.arange(text_length)[:, None].float() * torch.tensor([0.0, 1.0, 1.0])
        return {
            "hidden_states": torch.randn(1, grid[0] * grid[1], 16),
            "encoder_hidden_states": torch.randn(1, text_length, 48),
            "timestep": torch.rand(1),
            "img_ids": image_ids(grid, modality=1, start=40),
            "txt_ids": text_ids,
        }

    @torch.inference_mode()
    def test_an_edited_image_beside_the_new_one_like_diffusers(self, models):
        """An editing model's sequence: the generated image, then a condition image of another size."""
        reference, packed = models
        torch.manual_seed(5)
        sequence = self.make_sequence((4, 4), 5)
        sequence["hidden_states"] = torch.randn(1, 16 + 6, 16)
        sequence["img_ids"] = torch.cat([sequence["img_ids"], image_ids((2, 3), modality=2, start=40)])
        [prediction] = self.forward(packed, [sequence])
        torch.testing.assert_close(prediction, reference(**sequence)[0], rtol=0, atol=1e-5)

    @torch.inference_mode()
    def test_bits_do_not_depend_on_the_neighbours_timesteps(self, models):
        """Neighbours at one timestep are modulated in one operation, others apart."""
        _, packed = models
        sequences = self.draw(12, seed=9)
        for i, sequence in enumerate(sequences):
            sequence["timestep"] = torch.tensor([[0.9, 0.9, 0.4, 0.9][i % 4]])
        for sequence, prediction in zip(sequences, self.forward(packed, sequences), strict=True):
            assert torch.equal(prediction, self.forward(packed, [sequence])[0])

    @torch.inference_mode()
    def test_timesteps_ahead_are_remembered_and_change_no_bit(self, models, monkeypatch):
        _, packed = models
        packed.modulations.clear()
        sequences = self.draw(3, seed=11)
        expected = self.forward(packed, sequences)
        calls, compute = [], packed.compute_modulations
        monkeypatch.setattr(
            type(packed), "compute_modulations", lambda _, *args: calls.append(args[0]) or compute(*args)
        )
        for _ in range(2):
            prediction = packed(**self.pack(sequences), timesteps_ahead=torch.linspace(0.9, 0.1, 5))[0]
            assert torch.equal(prediction, torch.cat(expected, dim=1))
        assert [len(call) for call in calls] == [8]
