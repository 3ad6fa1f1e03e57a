"""The packed transformer: like diffusers' own, and bitwise independent of the batch."""

import copy
import random
from dataclasses import dataclass, replace
from math import prod

import pytest
import torch

from tests.model_builders.wan import IMAGE_WIDTH, LATENT_CHANNELS, SIZES, TEXT_WIDTH, wan_transformer
from tests.unit.adapter_checks import assert_independent, assert_like_merged
from vllm_cfg_plugin.pipelines.wan.transformer import PackedWanTransformer

# Latents' (frames, height, width): 1 to 330 tokens, so both CPU kernels of attention.
SHAPES = [(1, 2, 2), (1, 4, 6), (2, 4, 4), (3, 6, 4), (2, 10, 14), (3, 20, 22)]
TEXT_TOKENS = 512  # what diffusers pads every text to, and its image-to-video models count on
KINDS = {
    "text_to_video": {},
    "image_to_video": {"in_channels": 2 * LATENT_CHANNELS + 4, "with_image": True},
    "condition_channels": {"in_channels": 2 * LATENT_CHANNELS + 4},
    "token_timesteps": {},
}


@dataclass
class Video:
    """One sequence: what diffusers' model gets of it, each with a batch of one."""

    latents: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor | None


@dataclass
class Models:
    reference: torch.nn.Module
    packed: PackedWanTransformer
    kind: str

    def draw(self, count, seed=0):
        torch.manual_seed(seed)
        choose = random.Random(seed)
        return [self.draw_one(choose.choice(SHAPES), choose.choice([40.0, 999.0, 573.0])) for _ in range(count)]

    def draw_one(self, shape, timestep):
        frames, height, width = shape
        text = torch.zeros(1, TEXT_TOKENS, TEXT_WIDTH)
        text[:, : random.randrange(1, 40)].normal_()
        time = torch.tensor([timestep])
        if self.kind == "token_timesteps":  # of image-to-video: the first frame is given
            time = time.repeat(frames, height // 2, width // 2)
            time[0] = 0
            time = time.flatten()[None]
        return Video(
            torch.randn(1, self.reference.config.in_channels, *shape),
            time,
            text,
            torch.randn(1, 7, IMAGE_WIDTH) if self.kind == "image_to_video" else None,
        )

    def forward_packed(self, videos):
        prediction = self.packed(
            hidden_states=[video.latents for video in videos],
            timestep=[video.timestep[0] for video in videos],
            encoder_hidden_states=[video.text[0] for video in videos],
            encoder_hidden_states_image=[video.image for video in videos] if videos[0].image is not None else None,
            return_dict=False,
        )[0]
        shapes = [(1, LATENT_CHANNELS, *video.latents.shape[2:]) for video in videos]
        parts = prediction.split([prod(shape[2:]) for shape in shapes], dim=2)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def forward_reference(self, video):
        return self.reference(
            hidden_states=video.latents,
            timestep=video.timestep,
            encoder_hidden_states=video.text,
            encoder_hidden_states_image=video.image,
            return_dict=False,
        )[0]


@pytest.fixture(scope="module", params=[(kind, size) for kind in KINDS for size in SIZES], ids="-".join)
def models(request):
    kind, size = request.param
    torch.manual_seed(0)
    reference = wan_transformer(SIZES[size], **KINDS[kind])
    return Models(reference, PackedWanTransformer.adopt(copy.deepcopy(reference)), kind)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    reference = wan_transformer()
    return Models(reference, PackedWanTransformer.adopt(copy.deepcopy(reference)), "text_to_video")


@torch.inference_mode()
def test_like_diffusers(models):
    videos = models.draw(16)
    for video, prediction in zip(videos, models.forward_packed(videos), strict=True):
        expected = models.forward_reference(video)
        assert expected.std() > 0.1
        torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("modulating", [False, True])
def test_adapters(models, modulating):
    videos = models.draw(6, seed=11)

    def forward_packed(model, videos):
        return replace(models, packed=model).forward_packed(videos)

    def forward_one(model, video):
        return replace(models, reference=model).forward_reference(video)

    assert_like_merged(models.reference, models.packed, videos, forward_packed, forward_one, modulating)
    assert_independent(models.packed, videos, forward_packed, modulating)


@torch.inference_mode()
def test_bits_do_not_depend_on_the_batch(models):
    pool = models.draw(14, seed=1)
    alone = [models.forward_packed([video])[0] for video in pool]
    choose = random.Random(2)
    for _ in range(10):
        members = choose.sample(range(len(pool)), choose.choice([2, 3, 5, 8]))
        together = models.forward_packed([pool[i] for i in members])
        assert all(torch.equal(together[k], alone[i]) for k, i in enumerate(members)), members


@torch.inference_mode()
def test_bits_do_not_depend_on_equal_neighbours(models):
    """Runs of equal lengths take one attention call, and equal timesteps one modulation."""
    torch.manual_seed(3)
    run = [models.draw_one(shape, 500.0) for shape in SHAPES for _ in range(4)]
    for video, prediction in zip(run, models.forward_packed(run), strict=True):
        assert torch.equal(prediction, models.forward_packed([video])[0])


@torch.inference_mode()
def test_a_changed_neighbour_changes_nothing_else(models):
    """Sequences that leaked into each other would show here, where every input of a neighbour is replaced."""
    before = models.draw(5, seed=4)
    expected = models.forward_packed(before)
    for field in ("latents", "timestep", "text", *(["image"] if models.kind == "image_to_video" else [])):
        after = copy.copy(before)
        after[2] = copy.copy(before[2])
        setattr(after[2], field, getattr(before[2], field) + 1)
        pairs = zip(expected, models.forward_packed(after), strict=True)
        assert [torch.equal(old, new) for old, new in pairs] == [True, True, False, True, True], field


@torch.inference_mode()
def test_one_timestep_stands_for_all_tokens(tiny):
    """The 5B layout's text-to-video gives every token the same timestep."""
    video = tiny.draw(1, seed=5)[0]
    tokens = video.latents[0, 0].numel() // 4
    of_tokens = copy.copy(video)
    of_tokens.timestep = video.timestep.expand(tokens)[None]
    assert torch.equal(tiny.forward_packed([of_tokens])[0], tiny.forward_packed([video])[0])
    expected = tiny.forward_reference(of_tokens)
    torch.testing.assert_close(tiny.forward_packed([video])[0], expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_texts_of_several_lengths(tiny):
    """Nothing counts on a text's padding: shorter ones are attended to as they are."""
    videos = tiny.draw(4, seed=7)
    for length, video in zip((3, 1, 300, 17), videos, strict=True):
        video.text = torch.randn(1, length, TEXT_WIDTH)
    for video, prediction in zip(videos, tiny.forward_packed(videos), strict=True):
        torch.testing.assert_close(prediction, tiny.forward_reference(video), rtol=0, atol=1e-5)
        assert torch.equal(prediction, tiny.forward_packed([video])[0])


@torch.inference_mode()
def test_two_images_per_video_like_diffusers():
    """A first and a last frame: their embeddings share positions, as in Wan 2.1's FLF2V."""
    torch.manual_seed(8)
    reference = wan_transformer(**KINDS["image_to_video"], image_tokens=14)
    reference.condition_embedder.image_embedder.pos_embed.data.normal_()
    models = Models(reference, PackedWanTransformer.adopt(copy.deepcopy(reference)), "image_to_video")
    videos = models.draw(3)
    for video in videos:
        video.image = torch.randn(2, 7, IMAGE_WIDTH)
    for video, prediction in zip(videos, models.forward_packed(videos), strict=True):
        torch.testing.assert_close(prediction, models.forward_reference(video), rtol=0, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("keeps_float32", [True, False])
def test_half_precision_like_diffusers(keeps_float32):
    """With the modules in float32 that `from_pretrained` keeps there, and without."""
    torch.manual_seed(0)
    reference = wan_transformer().bfloat16()
    if keeps_float32:
        for name, parameter in reference.named_parameters():
            if any(part in name for part in reference._keep_in_fp32_modules):
                parameter.data = parameter.data.float()
    models = Models(reference, PackedWanTransformer.adopt(copy.deepcopy(reference)), "text_to_video")
    videos = models.draw(4, seed=9)
    for video in videos:
        video.latents, video.text = video.latents.bfloat16(), video.text.bfloat16()
    for video, prediction in zip(videos, models.forward_packed(videos), strict=True):
        assert prediction.dtype == torch.bfloat16
        torch.testing.assert_close(prediction, models.forward_reference(video), rtol=0, atol=0.05)


@torch.inference_mode()
def test_no_argument_is_changed(models):
    videos = models.draw(3, seed=10)
    given = copy.deepcopy(videos)
    models.forward_packed(videos)
    for video, before in zip(videos, given, strict=True):
        for field in ("latents", "timestep", "text"):
            assert torch.equal(getattr(video, field), getattr(before, field))


@torch.inference_mode()
def test_a_layer_with_a_hook_is_called(tiny):
    """What stands in for a linear layer must not bypass an adapter on it."""
    videos = tiny.draw(2, seed=11)
    before = tiny.forward_packed(videos)
    block, embedder = tiny.packed.blocks[0], tiny.packed.condition_embedder
    layers = (block.attn1.to_q, block.attn2.to_k, block.ffn.net[0].proj, block.ffn.net[2], embedder.time_proj)
    for layer in (*layers, embedder.text_embedder.linear_1, tiny.packed.patch_embedding, tiny.packed.proj_out):
        hook = layer.register_forward_hook(lambda module, args, output: output * 1.5)
        assert not torch.equal(tiny.forward_packed(videos)[0], before[0])
        hook.remove()
    assert torch.equal(tiny.forward_packed(videos)[0], before[0])


def test_what_does_not_fit_is_refused(tiny):
    [video] = tiny.draw(1)
    arguments = {
        "hidden_states": [video.latents],
        "timestep": [torch.tensor(3.0)],
        "encoder_hidden_states": [video.text[0]],
    }
    with pytest.raises(ValueError, match=r"\[1, 2, 1\]"):
        tiny.packed(**arguments | {"timestep": [torch.tensor(3.0)] * 2})
    with pytest.raises(ValueError, match="takes no image embedding"):
        tiny.packed(**arguments, encoder_hidden_states_image=[torch.randn(1, 7, IMAGE_WIDTH)])
    with pytest.raises(ValueError, match="timestep has 3 values"):
        tiny.packed(**arguments | {"timestep": [torch.ones(3)]})
    with_image = PackedWanTransformer.adopt(wan_transformer(with_image=True))
    with pytest.raises(ValueError, match="takes an image embedding"):
        with_image(**arguments)
