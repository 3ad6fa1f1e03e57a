"""How much of an accelerator's memory operations take, and how much is left; must not import vLLM."""

from __future__ import annotations

import torch


class DeviceMemory:
    """The memory of a GPU, as torch's allocator and the driver count it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def begin(self) -> None:
        """What is allocated from here on counts."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """Most bytes at a time since `begin`, beyond those before it."""
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def room(self, share: float) -> int:
        """Bytes that may still be allocated, if no more than this share of the memory is to be in use.

        What other processes and CUDA itself take counts as used; what torch keeps for later does not.
        """
        free, total = torch.cuda.mem_get_info(self._device)
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return max(0, free + kept - int(total * (1 - share)))


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Of a GPU; None for a CPU, whose memory is not ours to divide."""
    return DeviceMemory(device) if device.type == "cuda" else None
