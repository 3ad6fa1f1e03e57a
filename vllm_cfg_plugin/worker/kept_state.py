"""How far a video is, as bytes: the engine keeps them, so that a video need not begin again when ranks do.

Tensors and plain values only, no pickled objects: what a noise scheduler is made of follows from the request, and what
its steps changed is of such types. What is kept is noted between two steps and made into bytes beside them, as that
waits for the device. Must not import vLLM.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from vllm_cfg_plugin.pipelines.common.step_cache import History
from vllm_cfg_plugin.worker.state import RequestState

# Steps taken, latents, what its noise scheduler has become, the state of its generator, and what its cache holds.
Noted = tuple[int, torch.Tensor, dict[str, Any], torch.Tensor | None, History]

KEEP_EVERY_STEPS = 5
# Of a noise scheduler, what no step changes: its configuration, and what `set_timesteps` computed with numpy.
_CONSTANT = (dict, np.ndarray, np.generic)


def is_due(state: RequestState) -> bool:
    """Whether the request is to be kept now: a video, every few steps, and not when it is about to be decoded.

    Where a pipeline's own call runs, it can't be: what that holds is in a thread.
    """
    is_video = state.request.num_frames > 1 and not state.request.on_all_ranks
    return is_video and state.index % KEEP_EVERY_STEPS == 0 and not state.is_denoised


def note(state: RequestState) -> Noted:
    """Everything that its next steps depend on and that does not follow from the request.

    No step changes a tensor in place, so theirs are noted as they are.

    Raises:
        TypeError: its noise scheduler has become something that can't be kept.
    """
    changed = {name: value for name, value in vars(state.noise_scheduler).items() if not isinstance(value, _CONSTANT)}
    for name, value in changed.items():
        if not _is_plain(value):
            raise TypeError(f"{type(state.noise_scheduler).__name__}.{name} is a {type(value).__name__}")
    changed = {name: [*value] if isinstance(value, list) else value for name, value in changed.items()}
    generator = None if state.generator is None else state.generator.get_state()
    history = {branch: [*computed] for branch, computed in state.history.items()}
    return state.index, state.latents, changed, generator, history


def to_bytes(noted: Noted) -> torch.Tensor:
    """What was noted: uint8 [bytes]."""
    buffer = io.BytesIO()
    torch.save(noted, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def resume(state: RequestState, kept: bytes) -> None:
    """Put a fresh state where the kept one was; `kept` is from a rank of this engine, maybe of another device."""
    device = state.latents.device

    def place(storage: Any, location: str) -> Any:
        """Some parts are on the CPU wherever the latents are."""
        return storage if location == "cpu" else storage.cuda(device)

    noted: Noted = torch.load(io.BytesIO(kept), place, weights_only=True)
    state.index, state.latents, changed, generator, state.history = noted
    vars(state.noise_scheduler).update(changed)
    if state.generator is not None and generator is not None:
        state.generator.set_state(generator)


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))
