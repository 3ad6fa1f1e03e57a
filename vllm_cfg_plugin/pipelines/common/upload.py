"""Copies from the CPU to where the model is, for which the host does not wait; must import nothing but torch.

A plain copy to a GPU waits for all that is queued there, which costs a step the time of its forward: so what a step
brings along goes through pinned memory.
"""

from __future__ import annotations

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`; the tensor itself where it is there. On the meta device there is nothing to copy to."""
    if tensor.device == device or not tensor.is_cpu or device.type == "meta":
        return tensor.to(device)
    # torch keeps the pinned memory until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)
