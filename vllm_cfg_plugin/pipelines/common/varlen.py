"""Attention over packed sequences in one kernel, of those that GPUs have; must not import vLLM at module level.

FlashAttention 3 is vLLM's own build of it, so nothing else is to be installed. Its keys are not split over the GPU: how
they would be depends on the other sequences, and so would a sequence's result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from vllm_cfg_plugin.pipelines.common.packing import PackedRows

_HOPPER = 9
_AMPERE = (8, 0)


class PackedTensors(NamedTuple):
    """Queries, keys and values, [rows, heads, head_dim], without padding, and where the sequences lie in them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rows: PackedRows
    key_rows: PackedRows


# -> [rows, heads, head_dim]
VarlenKernel = Callable[[PackedTensors], torch.Tensor]


@cache
def varlen_kernel(device: torch.device, dtype: torch.dtype) -> VarlenKernel | None:
    """The kernel for tensors of this kind; None where there is none."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < _AMPERE:
        return None
    return flash_attention_3 if capability[0] == _HOPPER and _has_flash_attention_3() else torch_varlen


def flash_attention_3(packed: PackedTensors) -> torch.Tensor:
    """vLLM's FlashAttention 3."""
    from vllm.vllm_flash_attn import flash_attn_interface

    out: torch.Tensor = flash_attn_interface.flash_attn_varlen_func(
        packed.query,
        packed.key,
        packed.value,
        max_seqlen_q=packed.rows.max_seqlen,
        cu_seqlens_q=packed.rows.cu_seqlens,
        max_seqlen_k=packed.key_rows.max_seqlen,
        cu_seqlens_k=packed.key_rows.cu_seqlens,
        num_splits=1,
        fa_version=3,
    )
    return out


def torch_varlen(packed: PackedTensors) -> torch.Tensor:
    """torch's FlashAttention 2."""
    from torch.nn.attention.varlen import varlen_attn

    out: Any = varlen_attn(
        packed.query,
        packed.key,
        packed.value,
        packed.rows.cu_seqlens,
        packed.key_rows.cu_seqlens,
        packed.rows.max_seqlen,
        packed.key_rows.max_seqlen,
        num_splits=1,
    )
    return out


def _has_flash_attention_3() -> bool:
    """Whether vLLM's build has it."""
    try:
        from vllm.vllm_flash_attn import flash_attn_interface
    except ImportError:
        return False
    return bool(flash_attn_interface.FA3_AVAILABLE)
