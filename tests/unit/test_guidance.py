"""The combine formulas against numbers worked by hand, against diffusers' lines and against its guiders."""

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance

from vllm_cfg_plugin.guidance import (
    ZERO_INIT_STEPS,
    adaptive_projected_guidance,
    classifier_free_guidance,
    limit_to_norm,
    rescale_to_deviation,
    rescale_to_norm,
    zero_star_guidance,
)
from vllm_cfg_plugin.params import Guidance
from vllm_cfg_plugin.pipelines.wan import WanPipeline

STEPS = 10
SHAPES = [(1, 33, 20), (2, 64, 64), (3, 4, 16, 24), (1, 16, 3, 8, 12), (2, 16, 5, 6, 6)]  # tokens, image, video
DTYPES = [torch.float32, torch.bfloat16]


def draw_predictions(shape, dtype=torch.float32, seed=0):
    """A positive and a negative prediction that are alike, as those of a model are."""
    generator = torch.Generator().manual_seed(seed)
    common, first, second = torch.randn(3, *shape, generator=generator)
    return (common + 0.4 * first).to(dtype), (0.8 * common + 0.4 * second).to(dtype)


def draw_faint(shape, dtype=torch.float32):
    """Predictions so small that what keeps a division from zero is a part of the result."""
    return (1e-5 * each for each in draw_predictions(shape, dtype))


def by_guider(guider, step, positive, negative):
    guider.set_state(step, STEPS, torch.tensor(500))
    return guider.forward(positive, negative).pred


def test_classifier_free_guidance_by_hand():
    positive, negative = torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[1.0, 2.0]]])
    assert classifier_free_guidance(positive, negative, 4.0).tolist() == [[[9.0, -2.0]]]


def test_scale_zero_is_the_negative_branch():
    positive, negative = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    assert torch.equal(classifier_free_guidance(positive, negative, 0.0), negative)


def test_rescale_by_hand():
    positive, combined = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 10.0]]])
    assert rescale_to_norm(positive, combined).tolist() == [[[0.0, 5.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_like_diffusers(dtype):
    generator = torch.Generator().manual_seed(0)
    noise_pred, neg_noise_pred = torch.randn(2, 2, 33, 20, generator=generator).to(dtype).unbind(0)
    true_cfg_scale = 3.7
    # diffusers pipeline_qwenimage.py
    comb_pred = neg_noise_pred + true_cfg_scale * (noise_pred - neg_noise_pred)
    cond_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
    noise_norm = torch.norm(comb_pred, dim=-1, keepdim=True)
    expected = comb_pred * (cond_norm / noise_norm)
    combined = classifier_free_guidance(noise_pred, neg_noise_pred, true_cfg_scale)
    assert torch.equal(combined, comb_pred)
    assert torch.equal(rescale_to_norm(noise_pred, combined), expected)


def test_a_video_has_one_norm_per_voxel_over_its_channels():
    positive, combined = torch.randn(1, 16, 3, 4, 6), 5 * torch.randn(1, 16, 3, 4, 6)
    rescaled = rescale_to_norm(positive, combined, channel_dim=1)
    torch.testing.assert_close(rescaled.norm(dim=1), positive.norm(dim=1))
    assert WanPipeline.channel_dim == 1


def test_rescaled_has_the_positive_norm_at_every_token():
    """Rescaled prediction has the positive norm at every token."""
    positive, combined = torch.randn(1, 9, 16), 5 * torch.randn(1, 9, 16)
    norms = rescale_to_norm(positive, combined).norm(dim=-1)
    torch.testing.assert_close(norms, positive.norm(dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_star_like_the_guider(shape, dtype):
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=4.5)
    assert guider.zero_init_steps == ZERO_INIT_STEPS
    for positive, negative in (draw_predictions(shape, dtype), draw_faint(shape, dtype)):
        for step in (1, 2, 9):
            expected = by_guider(guider, step, positive, negative)
            assert torch.equal(zero_star_guidance(positive, negative, 4.5), expected)


def test_zero_star_leaves_out_what_the_branches_share():
    """With the negative prediction a multiple of the positive one, nothing is left to guide."""
    positive = torch.randn(1, 9, 16)
    torch.testing.assert_close(zero_star_guidance(positive, 3 * positive, 7.5), positive)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("eta", "norm_threshold"),
    [(1.0, 15.0), (1.0, 1e9), (0.0, 2.0), (0.5, 0.5), (0.5, 0.0)],
    ids=["default", "long", "cut", "cut short", "none"],
)
def test_projected_like_the_guider(shape, dtype, eta, norm_threshold):
    guider = AdaptiveProjectedGuidance(4.5, adaptive_projected_guidance_rescale=norm_threshold, eta=eta)
    for positive, negative in (draw_predictions(shape, dtype), draw_faint(shape, dtype)):
        for step in (0, 4, 9):
            expected = by_guider(guider, step, positive, negative)
            assert torch.equal(adaptive_projected_guidance(positive, negative, 4.5, eta, norm_threshold), expected)


def test_projected_defaults_are_the_guiders():
    positive, negative = draw_predictions((1, 64, 64))
    assert (positive - negative).norm() > 15
    expected = by_guider(AdaptiveProjectedGuidance(), 0, positive, negative)
    assert torch.equal(adaptive_projected_guidance(positive, negative, 7.5), expected)


def test_projected_without_eta_moves_at_right_angles():
    """Projected without eta moves at right angles to the positive prediction."""
    positive, negative = draw_predictions((1, 9, 16))
    moved = adaptive_projected_guidance(positive, negative, 7.5, eta=0.0) - negative
    assert (moved * positive).sum().abs() < 1e-4 * moved.norm() * positive.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescale_like_the_guiders(shape, dtype, rescale):
    positive, negative = draw_predictions(shape, dtype)
    pairs = [
        (ClassifierFreeGuidance(4.5, rescale), classifier_free_guidance(positive, negative, 4.5)),
        (ClassifierFreeZeroStarGuidance(4.5, 1, rescale), zero_star_guidance(positive, negative, 4.5)),
        (
            AdaptiveProjectedGuidance(4.5, guidance_rescale=rescale),
            adaptive_projected_guidance(positive, negative, 4.5),
        ),
    ]
    for guider, combined in pairs:
        expected = by_guider(guider, 5, positive, negative)
        assert torch.equal(rescale_to_deviation(positive, combined, rescale), expected)


def test_rescaled_zeros_stay_zeros():
    """As in the zero-init steps of CFG-Zero*, where diffusers' rescale divides by their deviation and predicts NaN."""
    positive, _ = draw_predictions((1, 9, 16))
    zeros = torch.zeros_like(positive)
    assert torch.equal(rescale_to_deviation(positive, zeros, 0.7), zeros)


def test_what_does_not_deviate_is_not_rescaled():
    positive, flat = torch.randn(1, 9, 16), torch.full((1, 9, 16), 3.0)
    assert torch.equal(rescale_to_deviation(positive, flat, 1.0), flat)


def test_limit_by_hand():
    """One norm for all tokens of an element: here 5, and 10 and 2.5 of the guided ones."""
    positive = torch.tensor([[[3.0], [4.0]]])
    longer, shorter = torch.tensor([[[0.0], [10.0]]]), torch.tensor([[[2.5], [0.0]]])
    assert limit_to_norm(positive, longer, 1.0).tolist() == [[[0.0], [5.0]]]
    assert limit_to_norm(positive, longer, 1.5).tolist() == [[[0.0], [7.5]]]
    assert limit_to_norm(positive, shorter, 1.0).tolist() == [[[2.5], [0.0]]]
    assert limit_to_norm(0 * positive, 0 * longer, 1.0).tolist() == [[[0.0], [0.0]]]


def test_a_batch_element_does_not_depend_on_the_others():
    positive, negative = draw_predictions((3, 33, 20))
    for combine in (
        lambda p, n: zero_star_guidance(p, n, 4.5),
        lambda p, n: adaptive_projected_guidance(p, n, 4.5, norm_threshold=2.0),
        lambda p, n: rescale_to_deviation(p, n, 0.7),
    ):
        together = combine(positive, negative)
        for i in range(3):
            torch.testing.assert_close(together[i : i + 1], combine(positive[i : i + 1], negative[i : i + 1]))


@pytest.mark.parametrize("steps", [1, 7, 10, 28, 50])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8), (0.01, 0.2), (0.3, 0.3), (0.29, 0.57), (0.7, 1.0)])
def test_guided_steps_are_the_guiders(steps, interval):
    guider = ClassifierFreeGuidance(guidance_scale=4.5, start=interval[0], stop=interval[1])
    guided = Guidance(interval=interval).guided_steps(steps)
    for step in range(steps):
        guider.set_state(step, steps, torch.tensor(500))
        assert (step in guided) == (guider.num_conditions == 2)


def test_limited_norms_are_those_of_diffusers():
    """Per batch element: the first is too long, the second is not."""
    positive, _ = draw_predictions((2, 9, 16))
    combined = positive * torch.tensor([3.0, 1.1])[:, None, None]
    # diffusers pipeline_z_image.py
    max_new_norm = torch.linalg.vector_norm(positive[0]) * 1.2
    expected = combined[0] * (max_new_norm / torch.linalg.vector_norm(combined[0]))
    limited = limit_to_norm(positive, combined, 1.2)
    torch.testing.assert_close(limited[0], expected)
    assert torch.equal(limited[1], combined[1])
    assert torch.equal(limit_to_norm(positive, torch.zeros(2, 9, 16), 1.2), torch.zeros(2, 9, 16))
