"""Attention of Wan's blocks over packed sequences, on diffusers' own modules; must not import vLLM.

A video attends to itself with rotary positions, then to its own text and, in image-to-video models that take one, to
the embeddings of its own image: the counterpart of `WanAttnProcessor` in diffusers' `transformer_wan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_cfg_plugin.pipelines.common import fused
from vllm_cfg_plugin.pipelines.common.attention import attend_sequences, norm_and_rotate, rotate
from vllm_cfg_plugin.pipelines.common.heads import all_rows_of_own_heads, own_rows_of_all_heads
from vllm_cfg_plugin.pipelines.common.linear import linear
from vllm_cfg_plugin.pipelines.common.packing import PackedRows
from vllm_cfg_plugin.pipelines.common.tensor_parallel import rms_norms


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
    """What each video gets from itself, after the output projection; windows of [rows, dim]."""
    norms = attn.norm_q, attn.norm_k
    projected = linear(attn.to_q, video, layout.video), linear(attn.to_k, video, layout.video)
    value = _heads(attn, linear(attn.to_v, video, layout.video))
    is_whole = layout.video.group.size == 1 and norms[0].weight.shape == norms[0].normalized_shape
    if is_whole and fused.is_enabled(video.device):
        query, key = (norm_and_rotate(*own, layout.rotation) for own in zip(norms, projected, strict=True))
    else:  # the norm is over the heads of all ranks
        query, key = (_heads(attn, normed) for normed in rms_norms(norms, projected))
        query, key, value = all_rows_of_own_heads(layout.video.group, (query, key, value))
        query, key = rotate(query, layout.rotation), rotate(key, layout.rotation)
    attended = layout.video.join(attend_sequences(query, key, value, layout.video, attn.processor))
    (own,) = own_rows_of_all_heads(layout.video.group, [attended])
    return linear(attn.to_out[0], own, layout.video)


def attend_to_conditions(
    attn: Any, video: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None, layout: WanLayout
) -> torch.Tensor:
    """What each video gets from its own text and image, after the output projection; windows of [rows, dim]."""
    norms = [attn.norm_q, attn.norm_k]
    projected = [linear(attn.to_q, video, layout.video), linear(attn.to_k, text, layout.text)]
    if image is not None:
        norms.append(attn.norm_added_k)
        projected.append(linear(attn.add_k_proj, image, layout.image))
    query, key, *of_image = (_heads(attn, normed) for normed in rms_norms(norms, projected))
    value = _heads(attn, linear(attn.to_v, text, layout.text))
    if image is not None:
        of_image.append(_heads(attn, linear(attn.add_v_proj, image, layout.image)))
    query, key, value, *of_image = all_rows_of_own_heads(layout.video.group, (query, key, value, *of_image))
    attended = layout.video.join(attend_sequences(query, key, value, layout.video, attn.processor, layout.text))
    if of_image:
        key, value = of_image
        attended += layout.video.join(attend_sequences(query, key, value, layout.video, attn.processor, layout.image))
    (own,) = own_rows_of_all_heads(layout.video.group, [attended])
    return linear(attn.to_out[0], own, layout.video)


def _heads(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """[rows, dim] as [rows, heads, head_dim]; under tensor parallelism a rank holds some of the heads."""
    return x.unflatten(-1, (-1, attn.inner_dim // attn.heads))
