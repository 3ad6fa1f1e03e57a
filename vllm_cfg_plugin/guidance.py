"""Pure formulas that combine the predictions of a request's branches; must import nothing but torch.

Every formula is written in the order of operations of the serial pipeline it comes from, so that the result is
bitwise the same wherever its inputs were computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# CFG-Zero* predicts zeros in so many first steps (section 4.2 of its paper), guided or not.
ZERO_INIT_STEPS = 1


def classifier_free_guidance(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """`negative + scale * (positive - negative)`.

    Classifier-free guidance, Ho and Salimans 2022, https://arxiv.org/abs/2207.12598, in the form of diffusers'
    `pipeline_qwenimage.py`.

    Args:
        positive, negative: predictions of the two branches, both [batch, tokens, channels].
        scale: guidance scale; 1 gives the positive prediction back, up to rounding.
    """
    return negative + scale * (positive - negative)


def rescale_to_norm(positive: torch.Tensor, combined: torch.Tensor, channel_dim: int = -1) -> torch.Tensor:
    """`combined * (|positive| / |combined|)`, with one norm per token, over its channels.

    Keeps the guided prediction as long as the positive one, against the over-saturation of large scales. The idea is
    that of Lin et al. 2023, section 3.4, https://arxiv.org/abs/2305.08891; the form is that of diffusers'
    `pipeline_qwenimage.py`.

    Args:
        positive: the positive branch's prediction, [batch, tokens, channels].
        combined: the guided prediction, of the same shape.
        channel_dim: where the channels are, if elsewhere.
    """
    positive_norm: torch.Tensor = torch.norm(positive, dim=channel_dim, keepdim=True)  # [batch, tokens, 1]
    combined_norm: torch.Tensor = torch.norm(combined, dim=channel_dim, keepdim=True)
    return combined * (positive_norm / combined_norm)


def limit_to_norm(positive: torch.Tensor, combined: torch.Tensor, most: float) -> torch.Tensor:
    """`combined * min(1, most * |positive| / |combined|)`, with one norm per batch element.

    The form of diffusers' `pipeline_z_image.py`, there `cfg_normalization`.

    Args:
        positive: the positive branch's prediction, [batch, ...].
        combined: the guided prediction, of the same shape.
        most: how many times the positive norm the guided one may be.
    """
    dims = list(range(1, positive.dim()))
    longest: torch.Tensor = most * torch.linalg.vector_norm(positive, dim=dims, keepdim=True)
    length: torch.Tensor = torch.linalg.vector_norm(combined, dim=dims, keepdim=True)
    return combined * torch.where(length > longest, longest / length, 1)


def rescale_to_deviation(positive: torch.Tensor, combined: torch.Tensor, rescale: float) -> torch.Tensor:
    """`rescale * combined * (std(positive) / std(combined)) + (1 - rescale) * combined`, per batch element.

    Lin et al. 2023, section 3.4, https://arxiv.org/abs/2305.08891, in the form of diffusers' `rescale_noise_cfg`
    (`guiders/guider_utils.py`); but a prediction of zeros stays one, where upstream divides by its deviation of zero.

    Args:
        positive: the positive branch's prediction, [batch, ...].
        combined: the guided prediction, of the same shape.
        rescale: from 0, which changes nothing, to 1.
    """
    dims = list(range(1, positive.dim()))
    positive_std, combined_std = (tensor.std(dim=dims, keepdim=True) for tensor in (positive, combined))
    factor = torch.where(combined_std == 0, 1, positive_std / combined_std)
    return rescale * (combined * factor) + (1 - rescale) * combined


def zero_star_guidance(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """`a * negative + scale * (positive - a * negative)`, a = <p, n> / (|n|^2 + 1e-8).

    CFG-Zero*, Fan et al. 2025, https://arxiv.org/abs/2503.18886: the negative prediction is first scaled by `a`, to
    come as close to the positive one as it can; the form is that of diffusers'
    `guiders/classifier_free_zero_star_guidance.py`. The method's other half, `ZERO_INIT_STEPS`, is the caller's.

    Args:
        positive, negative: predictions of the two branches, both [batch, ...]; `a` is one per batch element.
        scale: guidance scale.
    """
    rows, others = positive.flatten(1).float(), negative.flatten(1).float()
    product = torch.sum(rows * others, dim=1, keepdim=True)
    fit = (product / (torch.sum(others**2, dim=1, keepdim=True) + 1e-8)).to(positive.dtype)
    return classifier_free_guidance(positive, negative * fit.view(-1, *[1] * (positive.dim() - 1)), scale)


def adaptive_projected_guidance(
    positive: torch.Tensor, negative: torch.Tensor, scale: float, eta: float = 1.0, norm_threshold: float = 15.0
) -> torch.Tensor:
    """`negative + scale * (orthogonal + eta * parallel)`, the parts of `d * min(1, norm_threshold / |d|)`, d = p - n.

    APG, Sadat et al. 2024, https://arxiv.org/abs/2410.02416: the difference of the branches is cut to a norm and taken
    apart into what is parallel to the positive prediction, which saturates colours, and the rest. The form is that of
    diffusers' `guiders/adaptive_projected_guidance.py` without momentum.

    Args:
        positive, negative: predictions of the two branches, both [batch, ...]; norms and projections are one per batch
            element.
        scale: guidance scale.
        eta: weight of the parallel part.
        norm_threshold: largest norm of the difference; 0 is no limit.
    """
    dims = list(range(1, positive.dim()))
    difference = positive - negative
    if norm_threshold > 0:
        norm: torch.Tensor = difference.norm(p=2, dim=dims, keepdim=True)
        difference = difference * torch.clamp(norm_threshold / norm, max=1)
    precise, direction = difference.double(), positive.double()
    length: torch.Tensor = torch.linalg.vector_norm(direction, dim=dims, keepdim=True)
    direction = direction / length.clamp_min(1e-12)
    parallel = (precise * direction).sum(dim=dims, keepdim=True) * direction
    orthogonal = precise - parallel
    return negative + scale * (orthogonal.to(difference.dtype) + eta * parallel.to(difference.dtype))


# Rules other than classifier-free guidance itself: (positive, negative, scale) -> combined.
RULES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "cfg_zero_star": zero_star_guidance,
    "apg": adaptive_projected_guidance,
}
