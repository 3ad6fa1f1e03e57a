"""The packed transformer: like diffusers' own, and bitwise independent of the batch."""

import copy
import random
from dataclasses import dataclass

import pytest
import torch

from tests.model_builders.qwen_image import SIZES, transformer
from tests.unit.adapter_checks import assert_independent, assert_like_merged
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.qwen_image.transformer import PackedQwenImageTransformer

CHANNELS = 16
GRIDS = [(1, 1), (2, 3), (4, 4), (8, 8), (5, 7), (12, 12), (16, 19)]  # image tokens: 1 to 304, so both CPU kernels
TEXT_LENGTHS = [1, 1, 3, 5, 16, 17, 40]


@dataclass
class Sequence:
    latents: torch.Tensor
    prompt: torch.Tensor
    timestep: torch.Tensor
    shape: tuple[int, int, int]


@pytest.fixture(scope="module", params=SIZES)
def models(request):
    """(diffusers' transformer, ours over the same weights)"""
    torch.manual_seed(0)
    reference = transformer(SIZES[request.param])
    return reference, PackedQwenImageTransformer.adopt(copy.deepcopy(reference))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return PackedQwenImageTransformer.adopt(transformer(SIZES["tiny"]))


def draw_sequences(count, seed=0):
    torch.manual_seed(seed)
    choose = random.Random(seed)
    sequences = []
    for _ in range(count):
        height, width = choose.choice(GRIDS)
        text = choose.choice(TEXT_LENGTHS)
        sequences.append(
            Sequence(
                torch.randn(1, height * width, CHANNELS), torch.randn(1, text, 48), torch.rand(()), (1, height, width)
            )
        )
    return sequences


def forward_packed(model, sequences):
    prediction = model(
        hidden_states=torch.cat([s.latents for s in sequences], dim=1),
        encoder_hidden_states=torch.cat([s.prompt for s in sequences], dim=1),
        timestep=torch.stack([s.timestep for s in sequences]),
        img_shapes=[[s.shape] for s in sequences],
        txt_seq_lens=[s.prompt.shape[1] for s in sequences],
    )[0]
    return prediction.split([s.latents.shape[1] for s in sequences], dim=1)


def forward_alone(model, sequence):
    return model(
        hidden_states=sequence.latents,
        encoder_hidden_states=sequence.prompt,
        timestep=sequence.timestep[None],
        img_shapes=[[sequence.shape]],
    )[0]


@torch.inference_mode()
def test_like_diffusers(models):
    reference, packed = models
    sequences = draw_sequences(20)
    for sequence, prediction in zip(sequences, forward_packed(packed, sequences), strict=True):
        expected = forward_alone(reference, sequence)
        assert expected.std() > 0.1
        torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_bits_do_not_depend_on_the_batch(models):
    _, packed = models
    pool = draw_sequences(24, seed=1)
    alone = [forward_packed(packed, [sequence])[0] for sequence in pool]
    choose = random.Random(2)
    for _ in range(25):
        members = choose.sample(range(len(pool)), choose.choice([2, 3, 5, 8, 17]))
        together = forward_packed(packed, [pool[i] for i in members])
        assert all(torch.equal(together[k], alone[i]) for k, i in enumerate(members)), members


@torch.inference_mode()
def test_bits_do_not_depend_on_equal_neighbours(models):
    """Runs of equal lengths take one attention call; it must give the bits of many."""
    _, packed = models
    for height, width, text in [(8, 8, 5), (4, 4, 1), (5, 7, 16), (16, 19, 3)]:
        torch.manual_seed(height)
        run = [
            Sequence(
                torch.randn(1, height * width, CHANNELS), torch.randn(1, text, 48), torch.rand(()), (1, height, width)
            )
            for _ in range(8)
        ]
        together = forward_packed(packed, run)
        for sequence, prediction in zip(run, together, strict=True):
            assert torch.equal(prediction, forward_packed(packed, [sequence])[0])


@torch.inference_mode()
def test_bits_do_not_depend_on_the_neighbours_timesteps(models):
    """Neighbours at one timestep are modulated in one operation, others apart."""
    _, packed = models
    sequences = draw_sequences(12, seed=9)
    for i, sequence in enumerate(sequences):
        sequence.timestep = torch.tensor([0.9, 0.9, 0.4, 0.9][i % 4])
    together = forward_packed(packed, sequences)
    for sequence, prediction in zip(sequences, together, strict=True):
        assert torch.equal(prediction, forward_packed(packed, [sequence])[0])


@torch.inference_mode()
@pytest.mark.parametrize("modulating", [False, True])
def test_adapters(models, modulating):
    reference, packed = models
    sequences = draw_sequences(6, seed=11)
    assert_like_merged(reference, packed, sequences, forward_packed, forward_alone, modulating)
    assert_independent(packed, sequences, forward_packed, modulating)


@torch.inference_mode()
def test_no_argument_is_changed(models):
    """The forward works in place: never on the caller's tensors, not even where no padding makes a copy of them."""
    _, packed = models
    latents, prompt = torch.randn(1, 16, CHANNELS), torch.randn(1, 16, 48)
    given = latents.clone(), prompt.clone()
    packed(latents, prompt, timestep=torch.tensor([0.5]), img_shapes=[[(1, 4, 4)]])
    assert torch.equal(latents, given[0])
    assert torch.equal(prompt, given[1])


@torch.inference_mode()
def test_a_layer_with_a_hook_is_called(tiny):
    """What stands in for a linear layer must not bypass an adapter on it."""
    sequences = draw_sequences(2, seed=10)
    before = forward_packed(tiny, sequences)
    block = tiny.transformer_blocks[0]
    for layer in (block.attn.to_q, block.img_mlp.net[0].proj, block.img_mlp.net[2], block.txt_mod[1]):
        hook = layer.register_forward_hook(lambda module, args, output: output * 1.5)
        assert not torch.equal(forward_packed(tiny, sequences)[0], before[0])
        hook.remove()
    assert torch.equal(forward_packed(tiny, sequences)[0], before[0])


@torch.inference_mode()
@pytest.mark.parametrize("field", ["latents", "prompt", "timestep"])
def test_a_changed_neighbour_changes_nothing_else(tiny, field):
    """Sequences that leaked into each other would show here, where every input of a neighbour is replaced."""
    before = draw_sequences(5, seed=3)
    after = copy.copy(before)
    after[2] = copy.copy(before[2])
    setattr(after[2], field, torch.randn_like(getattr(before[2], field)))
    pairs = list(zip(forward_packed(tiny, before), forward_packed(tiny, after), strict=True))
    assert [torch.equal(old, new) for old, new in pairs] == [True, True, False, True, True]


@torch.inference_mode()
def test_ordinary_batch_with_mask_like_diffusers(models):
    reference, packed = models
    torch.manual_seed(4)
    latents, timestep = torch.randn(3, 24, CHANNELS), torch.rand(3)
    lengths = [7, 1, 4]
    prompts = torch.randn(3, 7, 48)
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in lengths])
    arguments = {"timestep": timestep, "img_shapes": [[(1, 4, 6)]] * 3}
    expected = reference(latents, prompts, mask, **arguments)[0]
    prediction = packed(latents, prompts, mask, **arguments, txt_seq_lens=lengths, guidance=None)[0]
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)
    for i, length in enumerate(lengths):
        sequence = Sequence(latents[i : i + 1], prompts[i : i + 1, :length], timestep[i], (1, 4, 6))
        assert torch.equal(prediction[i : i + 1], forward_packed(packed, [sequence])[0])


@torch.inference_mode()
def test_batch_of_one_with_padded_text_like_diffusers(models):
    reference, packed = models
    torch.manual_seed(8)
    arguments = {"timestep": torch.rand(1), "img_shapes": [[(1, 4, 4)]]}
    latents, prompt, mask = torch.randn(1, 16, CHANNELS), torch.randn(1, 5, 48), torch.tensor([[1, 1, 1, 0, 0]])
    expected = reference(latents, prompt, mask, **arguments)[0]
    torch.testing.assert_close(packed(latents, prompt, mask, **arguments)[0], expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_several_images_per_sequence_like_diffusers(models):
    """An editing model's sequence: the generated image, then a condition image of another size."""
    reference, packed = models
    torch.manual_seed(5)
    latents, prompt, timestep = torch.randn(1, 16 + 6, CHANNELS), torch.randn(1, 5, 48), torch.rand(1)
    arguments = {"timestep": timestep, "img_shapes": [[(1, 4, 4), (1, 2, 3)]]}
    expected = reference(latents, prompt, **arguments)[0]
    torch.testing.assert_close(packed(latents, prompt, **arguments)[0], expected, rtol=0, atol=1e-5)


CONDITIONING = [{}, {"zero_cond_t": True}, {"use_additional_t_cond": True, "use_layer3d_rope": True}]
SEVERAL_IMAGES = [
    [(1, 4, 4), (1, 2, 3)],
    [(1, 4, 4)],  # as of text alone
    [(1, 2, 2), (1, 5, 7), (1, 1, 1), (1, 12, 12)],
    [(1, 3, 5), (1, 3, 5), (1, 3, 5)],
    [(1, 16, 19), (1, 2, 2)],
]


@torch.inference_mode()
@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_images_as_conditions_like_diffusers_and_in_any_batch(conditioning):
    torch.manual_seed(11)
    reference = transformer(SIZES["tiny"], **conditioning)
    packed = PackedQwenImageTransformer.adopt(copy.deepcopy(reference))
    extra = {"additional_t_cond": torch.zeros(1, dtype=torch.long)} if "use_additional_t_cond" in conditioning else {}
    pool = [
        {
            "hidden_states": torch.randn(1, sum(height * width for _, height, width in shapes), CHANNELS),
            "encoder_hidden_states": torch.randn(1, text, 48),
            "timestep": torch.rand(1),
            "img_shapes": [shapes],
        }
        for shapes in SEVERAL_IMAGES
        for text in (3, 17)
    ]
    alone = [packed(**own)[0] for own in pool]
    for own, prediction in zip(pool, alone, strict=True):
        expected = reference(**own, **extra)[0]
        torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)
        assert torch.equal(packed(**own, **extra)[0], prediction)
    together = packed(
        hidden_states=torch.cat([own["hidden_states"] for own in pool], dim=1),
        encoder_hidden_states=torch.cat([own["encoder_hidden_states"] for own in pool], dim=1),
        timestep=torch.cat([own["timestep"] for own in pool]),
        timesteps_ahead=torch.rand(3),
        img_shapes=[own["img_shapes"][0] for own in pool],
        txt_seq_lens=[own["encoder_hidden_states"].shape[1] for own in pool],
    )[0].split([own["hidden_states"].shape[1] for own in pool], dim=1)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@torch.inference_mode()
def test_an_ordinary_batch_with_clean_images_like_diffusers():
    torch.manual_seed(12)
    reference = transformer(SIZES["tiny"], zero_cond_t=True)
    batch = {
        "hidden_states": torch.randn(3, 22, CHANNELS),
        "encoder_hidden_states": torch.randn(3, 5, 48),
        "timestep": torch.rand(3),
        "img_shapes": [[(1, 4, 4), (1, 2, 3)]] * 3,
    }
    prediction = PackedQwenImageTransformer.adopt(copy.deepcopy(reference))(**batch)[0]
    torch.testing.assert_close(prediction, reference(**batch)[0], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_other_additional_conditions_are_refused(tiny):
    sequence = draw_sequences(1)[0]
    with pytest.raises(ValueError, match=r"additional_t_cond=\[1\] is not valid"):
        tiny(
            sequence.latents,
            sequence.prompt,
            timestep=sequence.timestep[None],
            img_shapes=[[sequence.shape]],
            additional_t_cond=torch.ones(1, dtype=torch.long),
        )


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_like_diffusers(dtype):
    torch.manual_seed(0)
    reference = transformer(SIZES["tiny"]).to(dtype)
    packed = PackedQwenImageTransformer.adopt(copy.deepcopy(reference))
    for sequence in draw_sequences(5, seed=6):
        sequence.latents, sequence.prompt = sequence.latents.to(dtype), sequence.prompt.to(dtype)
        sequence.timestep = sequence.timestep.to(dtype)
        expected = forward_alone(reference, sequence)
        torch.testing.assert_close(forward_alone(packed, sequence), expected, rtol=0, atol=0.05)


def test_adopting_changes_the_model_itself():
    """So there is one state: an adapter or a hook on the model that a user passed acts in our pipeline."""
    reference = transformer(SIZES["tiny"])
    weights = dict(reference.named_parameters())
    packed = PackedQwenImageTransformer.adopt(reference)
    assert packed is reference
    assert all(weight is weights[name] for name, weight in packed.named_parameters())
    layouts = packed._layouts
    assert PackedQwenImageTransformer.adopt(packed)._layouts is layouts


def test_rows_that_do_not_fit_are_refused(tiny):
    sequence = draw_sequences(1)[0]
    arguments = {
        "hidden_states": torch.randn(1, 5, CHANNELS),
        "encoder_hidden_states": sequence.prompt,
        "timestep": torch.rand(1),
        "img_shapes": [[(1, 2, 2)]],
    }
    with pytest.raises(ValueError, match=r"hidden_states has 5 rows.*\[4\] have 4"):
        tiny(**arguments)
    with pytest.raises(ValueError, match="img_shapes has 2 entries for 1"):
        tiny(**arguments | {"img_shapes": [[(1, 2, 2)]] * 2})
    with pytest.raises(ValueError, match="there are 2 texts for 1 timesteps"):
        tiny(**arguments | {"hidden_states": torch.randn(1, 4, CHANNELS), "txt_seq_lens": [3, 4]})
    with pytest.raises(ValueError, match="ones followed by zeros"):
        tiny(
            **arguments
            | {
                "hidden_states": torch.randn(1, 4, CHANNELS),
                "encoder_hidden_states": torch.randn(1, 3, 48),
                "encoder_hidden_states_mask": torch.tensor([[0, 1, 1]]),
            }
        )
    with pytest.raises(ValueError, match="encoder_hidden_states has 6 rows"):
        tiny(
            hidden_states=torch.randn(1, 8, CHANNELS),
            encoder_hidden_states=torch.randn(1, 6, 48),
            timestep=torch.rand(2),
            img_shapes=[[(1, 2, 2)]] * 2,
            txt_seq_lens=[3, 4],
        )


def test_conditioning_that_is_not_packed_is_refused():
    reference = transformer(SIZES["tiny"])
    reference.register_to_config(guidance_embeds=True)
    with pytest.raises(ConfigurationError, match="guidance_embeds=true"):
        PackedQwenImageTransformer.adopt(copy.deepcopy(reference))
