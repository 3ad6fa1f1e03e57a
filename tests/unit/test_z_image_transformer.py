"""Z-Image's packed transformer: like diffusers' own, and bitwise independent of the batch."""

import copy
import random
from dataclasses import dataclass
from math import prod

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from tests.model_builders.qwen_image import SIZES
from tests.model_builders.z_image import LATENT_CHANNELS, transformer
from tests.unit.adapter_checks import assert_independent, assert_like_merged
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.z_image.transformer import FRAMES_PATCH, PATCH, PackedZImageTransformer

# Image tokens with their pad tokens: 32 to 512; 64 and 256 have no pad token, and both CPU kernels get their share.
GRIDS = [(1, 1, 1), (1, 2, 3), (1, 8, 8), (1, 5, 7), (1, 12, 12), (1, 16, 16), (1, 16, 19), (3, 4, 5)]
TEXT_LENGTHS = [1, 1, 3, 5, 16, 32, 33, 64]


@dataclass
class Sequence:
    latents: torch.Tensor
    prompt: torch.Tensor
    timestep: torch.Tensor


@pytest.fixture(scope="module", params=SIZES)
def models(request):
    """(diffusers' transformer, ours over the same weights)"""
    torch.manual_seed(0)
    reference = transformer(SIZES[request.param])
    return reference, PackedZImageTransformer.adopt(copy.deepcopy(reference))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return PackedZImageTransformer.adopt(transformer(SIZES["tiny"]))


def draw_sequence(grid, text_length):
    frames, height, width = grid
    latents = torch.randn(LATENT_CHANNELS, frames, 2 * height, 2 * width)
    return Sequence(latents, torch.randn(text_length, 48), torch.rand(()))


def draw_sequences(count, seed=0):
    torch.manual_seed(seed)
    choose = random.Random(seed)
    return [draw_sequence(choose.choice(GRIDS), choose.choice(TEXT_LENGTHS)) for _ in range(count)]


def forward_reference(model, sequence):
    return model([sequence.latents], sequence.timestep[None], [sequence.prompt], return_dict=False)[0][0]


def forward(model, sequences, **options):
    """Of each sequence what diffusers' forward returns of it."""
    sizes = [tuple(s.latents.shape[1:]) for s in sequences]
    grids = [(frames, height // 2, width // 2) for frames, height, width in sizes]
    prediction = model(
        torch.cat([model._patchify_image(s.latents, PATCH, FRAMES_PATCH)[0] for s in sequences])[None],
        torch.stack([s.timestep for s in sequences]),
        [s.prompt for s in sequences],
        grids=grids,
        return_dict=False,
        **options,
    )[0]
    parts = prediction[0].split([prod(grid) for grid in grids])
    return model.unpatchify(list(parts), sizes, PATCH, FRAMES_PATCH)


@torch.inference_mode()
def test_like_diffusers(models):
    reference, packed = models
    sequences = draw_sequences(20)
    for sequence, prediction in zip(sequences, forward(packed, sequences), strict=True):
        expected = forward_reference(reference, sequence)
        assert expected.std() > 0.1
        torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("modulating", [False, True])
def test_adapters(models, modulating):
    reference, packed = models
    sequences = draw_sequences(6, seed=11)
    assert_like_merged(reference, packed, sequences, forward, forward_reference, modulating)
    assert_independent(packed, sequences, forward, modulating)


@torch.inference_mode()
def test_bits_do_not_depend_on_the_batch(models):
    _, packed = models
    pool = draw_sequences(24, seed=1)
    alone = [forward(packed, [sequence])[0] for sequence in pool]
    choose = random.Random(2)
    for _ in range(25):
        members = choose.sample(range(len(pool)), choose.choice([2, 3, 5, 8, 17]))
        together = forward(packed, [pool[i] for i in members])
        assert all(torch.equal(together[k], alone[i]) for k, i in enumerate(members)), members


@torch.inference_mode()
@pytest.mark.parametrize(("grid", "text_length"), [((1, 8, 8), 5), ((1, 1, 1), 1), ((1, 5, 7), 32), ((1, 16, 19), 3)])
def test_bits_do_not_depend_on_equal_neighbours(models, grid, text_length):
    """Runs of equal lengths take one attention call; it must give the bits of many."""
    _, packed = models
    torch.manual_seed(3)
    run = [draw_sequence(grid, text_length) for _ in range(8)]
    for sequence, prediction in zip(run, forward(packed, run), strict=True):
        assert torch.equal(prediction, forward(packed, [sequence])[0])


@torch.inference_mode()
def test_bits_do_not_depend_on_the_neighbours_timesteps(models):
    """Neighbours at one timestep are modulated in one operation, others apart."""
    _, packed = models
    sequences = draw_sequences(12, seed=9)
    for i, sequence in enumerate(sequences):
        sequence.timestep = torch.tensor([0.9, 0.9, 0.4, 0.9][i % 4])
    for sequence, prediction in zip(sequences, forward(packed, sequences), strict=True):
        assert torch.equal(prediction, forward(packed, [sequence])[0])


@torch.inference_mode()
def test_timesteps_computed_ahead_change_no_bit(models):
    _, packed = models
    sequences = draw_sequences(3, seed=4)
    expected = forward(packed, sequences)
    packed.modulations.clear()
    ahead = torch.cat([torch.stack([s.timestep for s in sequences]), torch.linspace(0, 1, 20)])
    for _ in range(2):
        predictions = forward(packed, sequences, timesteps_ahead=ahead)
        assert all(map(torch.equal, predictions, expected))
    assert len(packed.modulations._entries) == 16


@torch.inference_mode()
@pytest.mark.parametrize("token", ["x_pad_token", "cap_pad_token"])
def test_pad_tokens_are_part_of_a_sequence(tiny, token):
    """A sequence that fills its rows has none; the pad tokens of its neighbour must not reach it."""
    filled, padded = draw_sequence((1, 8, 8), 32), draw_sequence((1, 5, 7), 5)
    before = forward(tiny, [filled, padded])
    parameter = getattr(tiny, token)
    parameter.mul_(2)
    after = forward(tiny, [filled, padded])
    parameter.div_(2)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("field", ["latents", "prompt", "timestep"])
def test_a_changed_neighbour_changes_nothing_else(tiny, field):
    """Sequences that leaked into each other would show here, where every input of a neighbour is replaced."""
    before = draw_sequences(5, seed=3)
    after = copy.copy(before)
    after[2] = copy.copy(before[2])
    setattr(after[2], field, torch.randn_like(getattr(before[2], field)))
    pairs = list(zip(forward(tiny, before), forward(tiny, after), strict=True))
    assert [torch.equal(old, new) for old, new in pairs] == [True, True, False, True, True]


@torch.inference_mode()
def test_no_argument_is_changed(models):
    """The forward works in place: never on the caller's tensors, not even where no padding makes a copy of them."""
    _, packed = models
    sequence = draw_sequence((1, 8, 8), 32)
    given = copy.deepcopy(sequence)
    forward(packed, [sequence])
    assert torch.equal(sequence.latents, given.latents)
    assert torch.equal(sequence.prompt, given.prompt)


@torch.inference_mode()
def test_a_layer_with_a_hook_is_called(tiny):
    """What stands in for a linear layer must not bypass an adapter on it."""
    sequences = draw_sequences(2, seed=10)
    before = forward(tiny, sequences)
    block, refiner = tiny.layers[0], tiny.context_refiner[0]
    mlp = block.feed_forward
    layers = [block.attention.to_q, mlp.w1, mlp.w2, mlp.w3, block.adaLN_modulation[0], refiner.feed_forward.w1]
    for layer in (*layers, tiny.cap_embedder[1], tiny.all_final_layer["2-1"].linear):
        hook = layer.register_forward_hook(lambda module, args, output: output * 1.5)
        assert not torch.equal(forward(tiny, sequences)[0], before[0])
        hook.remove()
    assert torch.equal(forward(tiny, sequences)[0], before[0])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_like_diffusers(dtype):
    """Against diffusers in float32: the packed forward rounds no more than diffusers' own in the same precision."""
    torch.manual_seed(0)
    reference = transformer(SIZES["tiny"])
    half = copy.deepcopy(reference).to(dtype)
    packed = PackedZImageTransformer.adopt(copy.deepcopy(half))
    for sequence in draw_sequences(5, seed=6):
        precise = forward_reference(reference, sequence)
        sequence.latents, sequence.prompt = sequence.latents.to(dtype), sequence.prompt.to(dtype)
        expected = forward_reference(half, sequence)
        [prediction] = forward(packed, [sequence])
        assert prediction.dtype == dtype
        error, upstream_error = ((each - precise).abs().mean() for each in (prediction, expected))
        assert error < 1.5 * upstream_error


def test_inputs_that_do_not_fit_are_refused(tiny):
    sequence = draw_sequence((1, 2, 2), 3)
    with pytest.raises(ValueError, match="1 images, 2 texts and 1 timesteps"):
        tiny(torch.randn(1, 4, 16), torch.rand(1), [sequence.prompt] * 2, grids=[(1, 2, 2)])
    with pytest.raises(ValueError, match=r"x has 5 patches, but its grids \[\(1, 2, 2\)\] have 4"):
        tiny(torch.randn(1, 5, 16), torch.rand(1), [sequence.prompt], grids=[(1, 2, 2)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"siglip_feat_dim": 16}, "siglip_feat_dim=16 is not supported"),
        ({"all_patch_size": (4,)}, r"all_patch_size and all_f_patch_size \[\(4, 1\)\] are not supported"),
    ],
)
def test_models_that_are_not_packed_are_refused(config, message):
    model = ZImageTransformer2DModel(
        dim=16, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=16, axes_dims=[4, 6, 6], **config
    )
    with pytest.raises(ConfigurationError, match=message):
        PackedZImageTransformer.adopt(model)
