"""Attention of Wan's blocks over packed sequences, on diffusers' own modules; must not import vLLM.

A video attends to itself with rotary positions, then to its own text and, in image-to-video models that take one, to
the embeddings of its own image: the counterpart of `WanAttnProcessor` in diffusers' `transformer_wan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_cfg_plugin.pipelines.common.attention import attend_sequences, rms_norm, rotate
from vllm_cfg_plugin.pipelines.common.linear import linear
from vllm_cfg_plugin.pipelines.common.packing import PackedRows


@dataclass(frozen=True)
class WanLayout:
    """Where the packed sequences lie, and what follows from it alone.

    Attributes:
        video, text: rows of each stream.
        image: rows of the image embeddings; None in a model without them.
        rotation: complex rotary factors of the video stream, [rows, 1, head_dim / 2].
    """

    video: PackedRows
    text: PackedRows
    image: PackedRows | None
    rotation: torch.Tensor


def attend_to_video(attn: Any, video: torch.Tensor, layout: WanLayout) -> torch.Tensor:
    """What each video gets from itself, after the output projection; [rows, dim]."""
    query = rotate(_heads(attn, rms_norm(attn.norm_q, linear(attn.to_q, video))), layout.rotation)
    key = rotate(_heads(attn, rms_norm(attn.norm_k, linear(attn.to_k, video))), layout.rotation)
    value = _heads(attn, linear(attn.to_v, video))
    attended = attend_sequences(query, key, value, layout.video, attn.processor)
    return linear(attn.to_out[0], layout.video.join(attended))


def attend_to_conditions(
    attn: Any, video: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None, layout: WanLayout
) -> torch.Tensor:
    """What each video gets from its own text and image, after the output projection; all are [rows, dim]."""
    query = _heads(attn, rms_norm(attn.norm_q, linear(attn.to_q, video)))
    key = _heads(attn, rms_norm(attn.norm_k, linear(attn.to_k, text)))
    value = _heads(attn, linear(attn.to_v, text))
    attended = layout.video.join(attend_sequences(query, key, value, layout.video, attn.processor, layout.text))
    if image is not None:
        key = _heads(attn, rms_norm(attn.norm_added_k, linear(attn.add_k_proj, image)))
        value = _heads(attn, linear(attn.add_v_proj, image))
        attended += layout.video.join(attend_sequences(query, key, value, layout.video, attn.processor, layout.image))
    return linear(attn.to_out[0], attended)


def _heads(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """[rows, dim] as [rows, heads, head_dim]; under tensor parallelism a rank holds some of the heads."""
    return x.unflatten(-1, (-1, attn.inner_dim // attn.heads))
