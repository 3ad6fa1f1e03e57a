"""Decoding and encoding a single image in two dimensions, against diffusers' own VAE with the same weights."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

from vllm_cfg_plugin.pipelines.qwen_image.vae import ImageQwenImageVAE

EMOJI = Path(__file__).parents[2] / "examples/models/emoji"
SIZES = [(8, 8), (16, 16), (4, 12), (15, 9), (32, 20)]  # height and width of the latents

# Measured, of values in -1..1: 2e-6 with the emoji's VAE. The tiny one is untrained and enlarges rounding errors:
# 1.2e-5, where diffusers' own result is as far from the one in float64. In float64 they differ by 5e-15.
TOLERANCE = {"emoji": 1e-5, "tiny": 5e-5}
# Of latents, measured: 4.5e-6 of values up to 5.5 with the emoji's VAE, where diffusers' own are 2.3e-6 from those in
# float64; 2.4e-7 of values up to 0.9 with the tiny one. In float64 they differ by 1e-14.
ENCODING_TOLERANCE = {"emoji": 1e-5, "tiny": 2e-6}


@pytest.fixture(scope="module", params=["tiny", "emoji"])
def model(request):
    return request.param


@pytest.fixture(scope="module")
def vaes(model, qwen_image_folders):
    """(diffusers' VAE, ours)"""
    folder = EMOJI if model == "emoji" else qwen_image_folders[model]
    reference, adopted = (AutoencoderKLQwenImage.from_pretrained(folder, subfolder="vae").eval() for _ in range(2))
    return reference, ImageQwenImageVAE.adopt(adopted)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def convolutions_in_3d(monkeypatch):
    """Shapes of what goes through 3-D convolutions."""
    shapes = []
    forward = QwenImageCausalConv3d.forward

    def record(self, x, cache_x=None):
        shapes.append(tuple(x.shape))
        return forward(self, x, cache_x)

    monkeypatch.setattr(QwenImageCausalConv3d, "forward", record)
    return shapes


def make_latents(vae, height, width, frames=1, batch=1):
    generator = torch.Generator().manual_seed(height * 100 + width)
    return torch.randn(batch, vae.config.z_dim, frames, height, width, generator=generator)


def decode(vae, latents):
    return vae.decode(latents, return_dict=False)[0]


def assert_alike(model, vaes, latents):
    reference, ours = vaes
    expected = decode(reference, latents)
    assert expected.std() > 0.05
    torch.testing.assert_close(decode(ours, latents), expected, rtol=0, atol=TOLERANCE[model])


@pytest.mark.parametrize("size", SIZES)
def test_an_image_like_diffusers(model, vaes, size):
    assert_alike(model, vaes, make_latents(vaes[0], *size))


def test_an_image_takes_no_convolution_in_3d_and_leaves_no_state(vaes, convolutions_in_3d):
    ours = vaes[1]
    ours.clear_cache()
    ours._feat_map = untouched = ["of a call on another thread"]
    ours.decode(make_latents(ours, 8, 8))
    assert not convolutions_in_3d
    assert ours._feat_map is untouched


@pytest.mark.parametrize("frames", [2, 3])
def test_a_video_like_diffusers(model, vaes, frames, convolutions_in_3d):
    latents = make_latents(vaes[0], 4, 6, frames)
    decode(vaes[1], latents)
    assert convolutions_in_3d
    assert_alike(model, vaes, latents)


def test_tiles_like_diffusers(model, vaes, monkeypatch):
    latents = make_latents(vaes[0], 24, 20)
    ratio = vaes[0].spatial_compression_ratio
    whole = decode(vaes[1], latents)
    for vae in vaes:
        # As `enable_tiling` sets them, and put back after the test.
        monkeypatch.setattr(vae, "use_tiling", True)
        for side in ("height", "width"):
            monkeypatch.setattr(vae, f"tile_sample_min_{side}", 12 * ratio)
            monkeypatch.setattr(vae, f"tile_sample_stride_{side}", 8 * ratio)
    assert_alike(model, vaes, latents)
    assert (decode(vaes[1], latents) - whole).abs().max() > 1e-4


def test_slices_like_diffusers(model, vaes, monkeypatch):
    latents = make_latents(vaes[0], 8, 12, batch=3)
    assert_alike(model, vaes, latents)
    monkeypatch.setattr(vaes[1], "use_slicing", True)
    images = decode(vaes[1], latents)
    alone = [decode(vaes[1], latents[i : i + 1]) for i in range(3)]
    assert torch.equal(images, torch.cat(alone))


@pytest.mark.parametrize("frames", [1, 5])
def test_encoding_like_diffusers(model, vaes, frames):
    reference, ours = vaes
    side = 8 * reference.spatial_compression_ratio
    video = torch.rand(1, 3, frames, side, side + 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected, encoded = (vae.encode(video).latent_dist.mean for vae in (reference, ours))
    assert expected.std() > 1e-3
    torch.testing.assert_close(encoded, expected, rtol=0, atol=ENCODING_TOLERANCE[model])


def test_an_image_is_encoded_as_the_first_frame_of_a_video(vaes):
    """Bitwise what upstream's way through its caches gives with the same convolutions."""
    ours = vaes[1]
    side = 8 * ours.spatial_compression_ratio
    image = torch.rand(2, 3, 1, side, side + 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(ours._encode(image), AutoencoderKLQwenImage._encode(ours, image))


@pytest.mark.parametrize("size", SIZES)
def test_an_image_is_bitwise_the_same_at_every_call(vaes, size):
    ours = vaes[1]
    latents = make_latents(ours, *size)
    first = decode(ours, latents)
    ours.decode(make_latents(ours, 12, 4))
    assert torch.equal(decode(ours, latents.clone()), first)


def test_calls_on_two_threads_do_not_meet(vaes):
    ours = vaes[1]
    latents = [make_latents(ours, 8, 8 + i) for i in range(4)]
    alone = [decode(ours, each) for each in latents]
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together = list(pool.map(torch.no_grad()(lambda each: decode(ours, each)), latents * 4))
    assert all(torch.equal(image, expected) for image, expected in zip(together, alone * 4, strict=True))


def test_images_are_encoded_on_one_thread_while_another_decodes(vaes):
    ours = vaes[1]
    side = 8 * ours.spatial_compression_ratio
    images = [torch.rand(1, 3, 1, side, side + 16 * i) * 2 - 1 for i in range(4)]
    latents = make_latents(ours, 8, 12)

    def encode(image):
        return ours.encode(image).latent_dist.mean

    alone, picture = [encode(image) for image in images], decode(ours, latents)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pictures = [pool.submit(torch.no_grad()(decode), ours, latents) for _ in range(8)]
        together = list(pool.map(torch.no_grad()(encode), images * 4))
    assert all(torch.equal(image, expected) for image, expected in zip(together, alone * 4, strict=True))
    assert all(torch.equal(future.result(), picture) for future in pictures)


def convert(vaes, dtype):
    """Copies of both VAEs in another dtype."""
    reference, ours = (AutoencoderKLQwenImage.from_config(vae.config) for vae in vaes)
    reference.load_state_dict(vaes[0].state_dict())
    ours.load_state_dict(vaes[1].state_dict())
    return reference.to(dtype), ImageQwenImageVAE.adopt(ours.to(dtype))


@pytest.mark.parametrize("size", SIZES)
def test_in_double_precision_an_image_is_that_of_diffusers(vaes, size):
    latents = make_latents(vaes[0], *size).double()
    expected, image = (decode(vae, latents) for vae in convert(vaes, torch.float64))
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-12)
    again, latents = (vae.encode(expected).latent_dist.mean for vae in convert(vaes, torch.float64))
    torch.testing.assert_close(latents, again, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_full_as_diffusers(vaes, dtype):
    """By the mean difference: the largest one is of a single pixel, and a matter of chance."""
    latents = make_latents(vaes[0], 16, 12)
    full = decode(vaes[0], latents)
    images = [decode(vae, latents.to(dtype)) for vae in convert(vaes, dtype)]
    assert [image.dtype for image in images] == [dtype, dtype]
    differences = [(image.float() - full).abs().mean().item() for image in images]
    assert differences[1] <= 1.2 * differences[0]


def test_no_weight_is_copied(qwen_image_folders):
    vae = AutoencoderKLQwenImage.from_pretrained(qwen_image_folders["tiny"], subfolder="vae")
    before = dict(vae.named_parameters())
    adopted = ImageQwenImageVAE.adopt(vae)
    assert all(parameter is before[name] for name, parameter in adopted.named_parameters())
    expected = decode(adopted, make_latents(vae, 8, 8))
    assert torch.equal(decode(ImageQwenImageVAE.adopt(adopted), make_latents(vae, 8, 8)), expected)
