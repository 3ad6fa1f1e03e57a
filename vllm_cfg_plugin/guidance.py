"""Pure formulas that combine the predictions of a request's branches; must import nothing but torch.

Every formula is written in the order of operations of the serial pipeline it comes from, so that the result is
bitwise the same wherever its inputs were computed.
"""

from __future__ import annotations

import torch


def classifier_free_guidance(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """`negative + scale * (positive - negative)`.

    Classifier-free guidance, Ho and Salimans 2022, https://arxiv.org/abs/2207.12598, in the form of diffusers'
    `pipeline_qwenimage.py`.

    Args:
        positive, negative: predictions of the two branches, both [batch, tokens, channels].
        scale: guidance scale; 1 gives the positive prediction back, up to rounding.
    """
    return negative + scale * (positive - negative)


def rescale_to_norm(positive: torch.Tensor, combined: torch.Tensor) -> torch.Tensor:
    """`combined * (|positive| / |combined|)`, with one norm per token, over its channels.

    Keeps the guided prediction as long as the positive one, against the over-saturation of large scales. The idea is
    that of Lin et al. 2023, section 3.4, https://arxiv.org/abs/2305.08891; the form is that of diffusers'
    `pipeline_qwenimage.py`.

    Args:
        positive: the positive branch's prediction, [batch, tokens, channels].
        combined: the guided prediction, of the same shape.
    """
    positive_norm: torch.Tensor = torch.norm(positive, dim=-1, keepdim=True)  # [batch, tokens, 1]
    combined_norm: torch.Tensor = torch.norm(combined, dim=-1, keepdim=True)
    return combined * (positive_norm / combined_norm)
