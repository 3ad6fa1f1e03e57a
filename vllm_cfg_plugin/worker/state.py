"""What a rank remembers of one request, and the cache of text embeddings.

All ranks hold the same latents and noise-scheduler state of every request; a rank holds the embeddings only of the
branches that it was told to encode. Must not import vLLM or torch.distributed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch

from vllm_cfg_plugin.params import DiffusionRequest


@dataclass
class RequestState:
    """One request on this rank.

    Attributes:
        latents: [1, image_tokens, channels].
        noise_scheduler: diffusers' noise scheduler of this request alone, its timesteps set.
        prompt_embeds: branch -> [text_tokens, dim], of the branches this rank was told to encode.
        owners: cfg rank that forwards each branch; empty until it runs.
        index: denoising steps taken.
        error: why it can't go on here; '' while it can. The other ranks learn of it in the next exchange.
    """

    id: int
    request: DiffusionRequest
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    noise_scheduler: Any = None
    prompt_embeds: dict[int, torch.Tensor] = field(default_factory=dict)
    owners: tuple[int, ...] = ()
    index: int = 0
    error: str = ""

    @property
    def is_denoised(self) -> bool:
        return self.index == self.request.num_inference_steps


class EmbeddingCache:
    """Least recently used text embeddings, bounded by their bytes: the empty negative prompt is encoded once."""

    def __init__(self, encode: Callable[[str], torch.Tensor], capacity_bytes: int) -> None:
        self._encode = encode
        self._capacity_bytes = capacity_bytes
        self._bytes = 0
        self._entries: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = Lock()  # texts are encoded on a thread beside the one that clears

    def get(self, prompt: str) -> torch.Tensor:
        """The prompt's embedding [text_tokens, dim], encoded if it is not here."""
        with self._lock:
            return self._get(prompt)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def _get(self, prompt: str) -> torch.Tensor:
        if (embeds := self._entries.get(prompt)) is not None:
            self._entries.move_to_end(prompt)
            return embeds
        embeds = self._encode(prompt)
        self._entries[prompt] = embeds
        self._bytes += embeds.nbytes
        while self._bytes > self._capacity_bytes and len(self._entries) > 1:
            _, evicted = self._entries.popitem(last=False)
            self._bytes -= evicted.nbytes
        return embeds
