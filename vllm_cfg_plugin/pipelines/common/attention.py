"""Attention over packed sequences, on diffusers' own attention modules of any family; must not import vLLM.

Each sequence attends to itself alone: as one stream, or as a text and an image stream with projections of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

from vllm_cfg_plugin.pipelines.common import fused
from vllm_cfg_plugin.pipelines.common.cpu_kernels import cpu_kernels
from vllm_cfg_plugin.pipelines.common.heads import all_rows_of_own_heads, own_rows_of_all_heads
from vllm_cfg_plugin.pipelines.common.linear import linear, onednn_linear
from vllm_cfg_plugin.pipelines.common.packing import ROW_MULTIPLE, PackedRows, common_runs, interleave
from vllm_cfg_plugin.pipelines.common.upload import upload
from vllm_cfg_plugin.pipelines.common.varlen import PackedTensors, varlen_kernel

# Scores computed at a time: 1 MiB of them.
_SCORES = 1 << 18
# Scores of one call of torch's kernel on a CPU, half a second of them: a request that is aborted stops between two.
_CALL_SCORES = 1 << 27
_CALL_ROWS = 256  # of queries, a multiple of which the kernel computes together if there are `_LEAST_CALL_ROWS`
_LEAST_CALL_ROWS = 768


@dataclass(frozen=True)
class JointLayout:
    """Where the packed sequences lie, and what follows from it alone.

    Attributes:
        text, image: the two streams.
        joint: the stream of attention: text then image of sequence 0, of sequence 1, ...
        rotation: complex rotary factors of the joint stream, [rows, 1, head_dim / 2], of at least as many rows as the
            padded stream has; None where the model has no rotary embedding.
        is_image: of each row of both streams, as `interleave` joins them, [rows]; otherwise it is of a text.
    """

    text: PackedRows
    image: PackedRows
    joint: PackedRows
    rotation: torch.Tensor | None

    @cached_property
    def is_image(self) -> torch.Tensor:
        sizes = [size for pair in zip(self.text.sizes, self.image.sizes, strict=True) for size in pair]
        kinds = torch.tensor([False, True]).repeat(len(sizes) // 2)
        return upload(kinds.repeat_interleave(torch.tensor(sizes)), self.joint.device)

    def part(self, sequences: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The image and the text stream of the joint stream's sequences."""
        texts, images = zip(
            *(rows.split((t, i)) for rows, t, i in zip(sequences, self.text.lengths, self.image.lengths, strict=True)),
            strict=True,
        )
        return self.image.join(images), self.text.join(texts)


def make_joint_layout(
    text_lengths: tuple[int, ...],
    image_lengths: tuple[int, ...],
    rotations: Sequence[torch.Tensor],
    device: torch.device,
) -> JointLayout:
    """The layout of sequences of so many text and image rows.

    Args:
        rotations: complex rotary factors [rows, head_dim / 2] of text, image, text, image, ...; empty for a model
            without rotary embedding.
    """
    text, image = PackedRows(text_lengths, device), PackedRows(image_lengths, device)
    joint = PackedRows(tuple(t + i for t, i in zip(text_lengths, image_lengths, strict=True)), device)
    if not rotations:
        return JointLayout(text, image, joint, None)
    padding = max(text.sizes[-1] + image.sizes[-1], joint.sizes[-1])
    return JointLayout(text, image, joint, F.pad(torch.cat([*rotations]), [0, 0, 0, padding])[:, None])


def joint_attention(
    attn: Any, image: torch.Tensor, text: torch.Tensor, layout: JointLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each sequence's image and text get from both, before the output projections.

    Args:
        image, text: this rank's windows of the streams, [rows, dim], as are those that are returned.
    """
    heads, group = _heads(attn), layout.joint.group
    streams = [
        linear(projection, stream, rows).unflatten(-1, heads)
        for of_text, of_image in (
            (attn.add_q_proj, attn.to_q),
            (attn.add_k_proj, attn.to_k),
            (attn.add_v_proj, attn.to_v),
        )
        for projection, stream, rows in ((of_text, text, layout.text), (of_image, image, layout.image))
    ]
    norms = (attn.norm_added_q, attn.norm_q, attn.norm_added_k, attn.norm_k)
    is_fused = _is_fused(norms, layout.rotation, image.device)
    if not is_fused:
        streams[:4] = [rms_norm(norm, stream) for norm, stream in zip(norms, streams, strict=False)]
    joined = interleave(layout.text, layout.image, all_rows_of_own_heads(group, streams))  # query, key, value
    if is_fused:
        query = _norm_and_rotate_joint(norms[:2], joined[0], layout)
        key = _norm_and_rotate_joint(norms[2:], joined[1], layout)
    else:
        query, key = rotate(joined[:2], layout.rotation)
    attended = layout.part(attend_sequences(query, key, joined[2], layout.joint, attn.processor))
    image, text = own_rows_of_all_heads(group, attended)
    return image, text


def self_attention(attn: Any, stream: torch.Tensor, rows: PackedRows, rotation: torch.Tensor | None) -> torch.Tensor:
    """What each sequence of one stream gets from itself, before the output projection.

    Args:
        stream: this rank's window of it, [rows, dim], as is what is returned.
        rotation: of the whole stream's rows, see `JointLayout`.
    """
    heads = _heads(attn)
    query, key, value = (linear(own, stream, rows).unflatten(-1, heads) for own in (attn.to_q, attn.to_k, attn.to_v))
    is_fused = _is_fused((attn.norm_q, attn.norm_k), rotation, stream.device)
    if not is_fused:
        query, key = rms_norm(attn.norm_q, query), rms_norm(attn.norm_k, key)
    query, key, value = all_rows_of_own_heads(rows.group, (query, key, value))
    if is_fused:
        query, key = (norm_and_rotate(norm, x, rotation) for norm, x in ((attn.norm_q, query), (attn.norm_k, key)))
    else:
        query, key = rotate(query, rotation), rotate(key, rotation)
    (own,) = own_rows_of_all_heads(rows.group, [rows.join(attend_sequences(query, key, value, rows, attn.processor))])
    return own


def rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """torch's or diffusers' RMSNorm, the same numbers in float32 but for the last bit; None leaves x as it is."""
    return x if norm is None else scaled_rms_norm(x, norm.weight, norm.eps)


def scaled_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The RMS norm of x [..., dim] with a weight [dim], None for ones."""
    if not (x.is_cpu and x.dtype == torch.float32):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    # torch has no fused kernel for the CPU: these four operations take half the time of its seven.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(x.new_tensor(eps), length, length, value=1 / x.shape[-1]).rsqrt_()
    return x * scale if weight is None else (x * scale).mul_(weight)


def rotate(x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """Rotary position embedding of [..., rows, heads, head_dim], neighbours paired as complex numbers; may change x."""
    if rotation is None:
        return x
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(rotation[: x.shape[-3]])).flatten(-2).type_as(x)


def norm_and_rotate(norm: Any, x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """`rms_norm` and `rotate` of [rows, heads, head_dim] in one kernel; see `fused.py` for a norm over all heads."""
    normed: torch.Tensor = fused.compiled(fused.norm_and_rotate_rows)(x, norm.weight, _turns(x, rotation), norm.eps)
    return normed


def _norm_and_rotate_joint(norms: Sequence[Any], x: torch.Tensor, layout: JointLayout) -> torch.Tensor:
    of_text, of_image = norms
    weights, turns = (of_text.weight, of_image.weight), _turns(x, layout.rotation)
    normed: torch.Tensor = fused.compiled(fused.norm_and_rotate_joint)(
        x, *weights, layout.is_image, turns, of_image.eps
    )
    return normed


def _turns(x: torch.Tensor, rotation: Any) -> torch.Tensor:
    """Cosine and sine for each row of x."""
    return torch.view_as_real(rotation[: x.shape[0]])


def _is_fused(norms: Sequence[Any], rotation: torch.Tensor | None, device: torch.device) -> bool:
    has_weights = all(getattr(norm, "weight", None) is not None for norm in norms)
    return rotation is not None and has_weights and fused.is_enabled(device)


def attend_sequences(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: PackedRows,
    processor: Any,
    key_rows: PackedRows | None = None,
) -> list[torch.Tensor]:
    """Attention of each sequence's queries to its own keys, [length, heads * head_dim]; inputs [rows, heads, head_dim].

    Args:
        processor: the attention module's, which names the kernel if the user chose one.
        key_rows: where the sequences lie in key and value, if these are another stream than the query's.
    """
    key_rows = key_rows or rows
    kernel = varlen_kernel(query.device, query.dtype)
    if kernel is not None and _is_native(processor):
        packed = query[: rows.total], key[: key_rows.total], value[: key_rows.total]
        return rows.split(kernel(PackedTensors(*packed, rows, key_rows)).flatten(1))
    attended: list[torch.Tensor] = []
    is_float_cpu = query.is_cpu and query.dtype == torch.float32 and _is_native(processor)
    onednn_from = cpu_kernels().attention_from if is_float_cpu else None
    for run, of_keys in common_runs(rows, key_rows):
        blocks = run.block(query), of_keys.block(key), of_keys.block(value)
        if onednn_from is not None and min(run.length, of_keys.length) >= onednn_from:
            attended += [_attend_onednn(*one) for one in zip(*blocks, strict=True)]
            continue
        # A kernel works on one sequence and head at a time: a run of equal lengths gives the same bits as one by one.
        scores = blocks[0].shape[0] * query.shape[1] * run.length * of_keys.length
        if query.is_cpu and _is_native(processor) and scores > _CALL_SCORES:
            attended += [_attend_in_pieces(*one) for one in zip(*blocks, strict=True)]
            continue
        attended += dispatch_attention_fn(*blocks, backend=_backend(processor)).flatten(2).unbind(0)
    return attended


def _attend_in_pieces(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one sequence by torch's kernel on a CPU, the bits of one call, [queries, heads * head_dim].

    Args:
        query, key, value: [length, heads, head_dim].
    """
    length, heads = query.shape[:2]
    heads_at_once = max(1, _CALL_SCORES // (length * key.shape[0]))
    rows = max(_LEAST_CALL_ROWS, _CALL_SCORES // key.shape[0] // _CALL_ROWS * _CALL_ROWS)
    # The last call has what is left over as well: fewer rows than the least would be computed otherwise.
    ends = [*range(rows, length - _LEAST_CALL_ROWS + 1, rows), length] if heads_at_once == 1 else [length]
    attended = torch.empty_like(query)
    for first in range(0, heads, heads_at_once):
        some = slice(first, first + heads_at_once)
        begin = 0
        for end in ends:
            piece = dispatch_attention_fn(query[None, begin:end, some], key[None, :, some], value[None, :, some])
            attended[begin:end, some] = piece[0]
            begin = end
    return attended.flatten(1)


def _attend_onednn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one long sequence on a CPU in float32, [queries, heads * head_dim]; inputs are [length, heads, ...].

    torch's own kernel is built on MKL's products, see `linear.py`. The scores of some rows at a time stay in the cache.
    """
    attended = torch.empty_like(query)
    query = (query.transpose(0, 1) * query.shape[-1] ** -0.5).contiguous()  # [heads, queries, head_dim]
    key, value = key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
    rows = max(ROW_MULTIPLE, _SCORES // key.shape[1] // ROW_MULTIPLE * ROW_MULTIPLE)
    for head in range(query.shape[0]):
        for first in range(0, query.shape[1], rows):
            some = slice(first, first + rows)
            scores = onednn_linear(query[head, some], key[head])
            torch.softmax(scores, dim=-1, out=scores)
            attended[some, head] = onednn_linear(scores, value[head].t())
    return attended.flatten(1)


def _is_native(processor: Any) -> bool:
    """Whether the user left diffusers' choice of attention kernel to torch."""
    active: AttentionBackendName = _AttentionBackendRegistry.get_active_backend()[0]
    return _backend(processor) is None and active == AttentionBackendName.NATIVE


def _backend(processor: Any) -> Any:
    """The kernel that the user chose for this module; diffusers' older processors know no choice."""
    return getattr(processor, "_attention_backend", None)


def _heads(attn: Any) -> tuple[int, int]:
    """(-1, head_dim): under tensor parallelism a rank holds some of the heads."""
    return -1, attn.inner_dim // attn.heads
