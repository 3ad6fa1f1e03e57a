"""Embeddings as bytes, for ranks that have no text encoders; must not import vLLM."""

from __future__ import annotations

import torch
from safetensors.torch import load, save

from vllm_cfg_plugin.pipelines.base import PromptEmbeds


def pack_embeds(embeds: PromptEmbeds) -> torch.Tensor:
    """What a text became as a safetensors file: uint8 [bytes], on the CPU."""
    named = {"tokens": embeds.tokens} | ({} if embeds.pooled is None else {"pooled": embeds.pooled})
    packed = save({name: tensor.cpu().contiguous() for name, tensor in named.items()})
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def unpack_embeds(packed: bytes, device: torch.device) -> PromptEmbeds:
    """What `pack_embeds` packed, on a device."""
    named = {name: tensor.to(device) for name, tensor in load(packed).items()}
    return PromptEmbeds(named["tokens"], named.get("pooled"))
