"""The adapters that a rank has read, for the requests that carry them; must not import vLLM.

A request says which file each of its adapters is, so ranks that are started anew read them again when they are needed.
One that is forgotten here, or that nobody may ask for any more, lives on in the requests that carry it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

from vllm_cfg_plugin.params import LoRA
from vllm_cfg_plugin.pipelines.adapter_reader import read_adapter
from vllm_cfg_plugin.pipelines.adapters import Adapter, Carried
from vllm_cfg_plugin.pipelines.base import EnginePipeline


class AdapterLimits(NamedTuple):
    """What a rank keeps.

    Attributes:
        rank: of any adapter.
        on_host, on_device: adapters.
    """

    rank: int = 0
    on_host: int = 0
    on_device: int = 0


NO_ADAPTERS = AdapterLimits()


class AdapterStore:
    """Adapters in host memory and on the device, the least recently used of each forgotten; safe for threads.

    Args:
        pipeline: whose transformers they adapt.
    """

    def __init__(self, pipeline: EnginePipeline, limits: AdapterLimits) -> None:
        self._pipeline = pipeline
        self._max_rank = limits.rank
        self._host = _Recent(limits.on_host)
        self._on_device = _Recent(limits.on_device)
        self._lock = Lock()

    def carried(self, loras: Sequence[LoRA]) -> Carried:
        """What a request carries.

        Raises:
            ConfigurationError: an adapter can't be read any more; says why.
        """
        return tuple((self.get(lora), lora.scale) for lora in loras)

    def get(self, lora: LoRA) -> Adapter:
        """An adapter on the device.

        Raises:
            ConfigurationError: it can't be read, or does not fit the model; says why.
        """
        with self._lock:
            if (found := self._on_device.get(lora.key)) is not None:
                return found
            adapter = self._host.get(lora.key) or read_adapter(lora, self._pipeline, self._max_rank)
            self._host.put(adapter)
            placed = adapter.to(self._pipeline.prediction_like.device)
            self._on_device.put(placed)
            return placed


class _Recent:
    """So many adapters, those that were used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[str, Adapter] = OrderedDict()

    def get(self, key: str) -> Adapter | None:
        if (found := self._entries.get(key)) is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, adapter: Adapter) -> None:
        self._entries[adapter.key] = adapter
        self._entries.move_to_end(adapter.key)
        while len(self._entries) > self._most:
            self._entries.popitem(last=False)
