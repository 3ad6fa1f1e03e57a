"""The combine formulas against numbers worked by hand and against diffusers' lines."""

import pytest
import torch

from vllm_cfg_plugin.guidance import classifier_free_guidance, rescale_to_norm


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


def test_rescaled_prediction_has_the_positive_norm_at_every_token():
    positive, combined = torch.randn(1, 9, 16), 5 * torch.randn(1, 9, 16)
    norms = rescale_to_norm(positive, combined).norm(dim=-1)
    torch.testing.assert_close(norms, positive.norm(dim=-1))
