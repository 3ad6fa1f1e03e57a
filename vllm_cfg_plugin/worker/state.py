"""What a rank remembers of one request, and the LRU cache of what texts and images became.

All ranks hold the same latents and noise-scheduler state of every request; a rank holds the embeddings only of the
branches that it was told to encode, and what the images became only with them. Must not import vLLM or
torch.distributed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Generic, TypeVar

import torch

from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import PromptEmbeds

Value = TypeVar("Value")


@dataclass
class RequestState:
    """One request on this rank.

    Attributes:
        latents: [1, ...].
        noise_scheduler: diffusers' noise scheduler of this request alone, its timesteps set.
        generator: draws its first latents, then the noise of steps that draw some; alike on all ranks.
        prediction_shape: of one branch's prediction, without its leading 1.
        prompt_embeds: of the branches this rank was told to encode.
        condition: what the request's images became, on ranks that encoded a branch.
        owners: cfg rank that forwards each branch, those of this step only; empty until it runs.
        index: denoising steps taken.
        error: why it can't go on here; '' while it can. The other ranks learn of it in the next exchange.
    """

    id: int
    request: DiffusionRequest
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    noise_scheduler: Any = None
    generator: torch.Generator | None = None
    prediction_shape: tuple[int, ...] = ()
    prompt_embeds: dict[int, PromptEmbeds] = field(default_factory=dict)
    condition: Sequence[torch.Tensor] = ()
    owners: tuple[int, ...] = ()
    index: int = 0
    error: str = ""

    @property
    def is_denoised(self) -> bool:
        return self.index == self.request.num_inference_steps


class TensorCache(Generic[Value]):
    """LRU cache of values made of tensors, limited by total bytes. The newest value is kept whatever its size.

    Args:
        tensors: returns the tensors of a value.
    """

    def __init__(self, tensors: Callable[[Value], Sequence[torch.Tensor]], capacity_bytes: int) -> None:
        self._tensors = tensors
        self._capacity_bytes = capacity_bytes
        self._bytes = 0
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = Lock()  # values are made on a thread beside the one that clears

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made if it is not here."""
        with self._lock:
            if (value := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
                return value
            value = self._entries[key] = make()
            self._bytes += self._size(value)
            while self._bytes > self._capacity_bytes and len(self._entries) > 1:
                _, evicted = self._entries.popitem(last=False)
                self._bytes -= self._size(evicted)
            return value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def _size(self, value: Value) -> int:
        return sum(tensor.nbytes for tensor in self._tensors(value))
