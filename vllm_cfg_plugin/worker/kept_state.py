"""How far a video is, as bytes: the engine keeps them, so that a video need not begin again when ranks do.

Must not import vLLM.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from vllm_cfg_plugin.worker.state import RequestState

KEEP_EVERY_STEPS = 5


def is_due(state: RequestState) -> bool:
    """Whether the request is to be kept now: a video, every few steps, and not when it is about to be decoded."""
    return state.request.num_frames > 1 and state.index % KEEP_EVERY_STEPS == 0 and not state.is_denoised


def keep(state: RequestState) -> torch.Tensor:
    """Everything that its next steps depend on and that does not follow from the request: uint8 [bytes]."""
    generator = None if state.generator is None else state.generator.get_state()
    buffer = io.BytesIO()
    torch.save((state.index, state.latents, state.noise_scheduler, generator), buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def resume(state: RequestState, kept: bytes) -> None:
    """Put a fresh state where the kept one was; `kept` is from a rank of this engine, maybe of another device."""
    device = state.latents.device

    def place(storage: Any, location: str) -> Any:
        """Some parts are on the CPU wherever the latents are."""
        return storage if location == "cpu" else storage.cuda(device)

    index, latents, noise_scheduler, generator = torch.load(io.BytesIO(kept), place, weights_only=False)
    state.index, state.latents, state.noise_scheduler = index, latents, noise_scheduler
    if state.generator is not None:
        state.generator.set_state(generator)
