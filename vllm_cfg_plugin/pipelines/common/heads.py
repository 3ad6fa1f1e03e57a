"""Rows against heads: what ranks that share rows trade around attention; must not import vLLM.

Before attention a rank has some rows of all heads, within it all rows of some heads: the two all-to-alls of Ulysses
(https://arxiv.org/abs/2309.14509). Where one rank has the forward to itself, nothing happens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_cfg_plugin.distributed.sequence_group import Peers
from vllm_cfg_plugin.errors import ConfigurationError


def all_rows_of_own_heads(group: Peers, streams: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[window rows, heads, head_dim] of each stream -> [rows, own heads, head_dim] of each; one all-to-all.

    Raises:
        ConfigurationError: the heads can't be shared evenly.
    """
    if group.size == 1:
        return [*streams]
    heads = streams[0].shape[1]
    if heads % group.size:
        raise ConfigurationError(
            f"sequence_parallel_size={group.size} is not valid: it must divide the {heads} attention heads of the model"
        )
    parts = torch.cat([*streams]).unflatten(1, (group.size, -1)).transpose(0, 1)  # [ranks, rows, heads, head_dim]
    received = group.all_to_all(parts).split([stream.shape[0] for stream in streams], dim=1)
    return [stream.flatten(0, 1) for stream in received]


def own_rows_of_all_heads(group: Peers, streams: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[rows, own heads * head_dim] of each stream -> [window rows, heads * head_dim] of each; one all-to-all."""
    if group.size == 1:
        return [*streams]
    parts = torch.cat([stream.unflatten(0, (group.size, -1)) for stream in streams], dim=1)  # [ranks, rows, own dim]
    rows = group.all_to_all(parts).transpose(0, 1).flatten(1)
    return [*rows.split([stream.shape[0] // group.size for stream in streams])]
