"""Who takes a step together on one rank, what it forwards for them, and what of that is valid.

Must not import vLLM or torch.distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import BranchInput
from vllm_cfg_plugin.worker.exchange import ExchangeLayout, Slot
from vllm_cfg_plugin.worker.state import RequestState


@dataclass(frozen=True)
class Lineup:
    """The requests that step together, and what follows from that; all ranks have the same.

    Attributes:
        layout: of the exchange.
        mine: this rank's forwards, neighbours of equal shape side by side: they share an attention call.
        forwarded: what this rank has forwarded beside the steps.
    """

    states: list[RequestState]
    layout: ExchangeLayout
    mine: list[Slot]
    forwarded: list[Slot]

    @classmethod
    def of(cls, running: Sequence[RequestState], long: Sequence[RequestState], rank: int, ranks: int) -> Lineup:
        """`long`: requests whose forwards are done already."""
        states = [*running, *long]
        layout = ExchangeLayout.of([state.owners for state in states], [s.prediction_shape for s in states], ranks)
        owned = [cell.slot for cell in layout.cells if cell.rank == rank]
        mine = [slot for slot in owned if slot[0] < len(running)]
        mine.sort(key=lambda slot: _lengths(states[slot[0]].request, slot[1]))
        return cls(states, layout, mine, [slot for slot in owned if slot[0] >= len(running)])


def branch_input(state: RequestState, branch: int) -> BranchInput:
    """What one forward of the request's next step takes."""
    timesteps = state.noise_scheduler.timesteps
    return BranchInput(
        request=state.request,
        latents=state.latents,
        embeds=state.prompt_embeds[branch],
        timestep=timesteps[state.index],
        branch=branch,
        condition=state.condition,
        timesteps_ahead=timesteps[state.index + 1 :],
        carried=state.carried,
    )


def checked_shape(shape: object) -> tuple[int, ...]:
    """The shape of a request's predictions, from which all ranks compute the layout of the exchange.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"prediction_shape returned {shape!r}, and not a tuple of integers from 1 up")
    return shape


def checked_prediction(outcome: torch.Tensor | Exception, shape: tuple[int, ...]) -> torch.Tensor:
    """The prediction, which every rank reads out of the exchange in this shape."""
    if isinstance(outcome, Exception):
        raise outcome
    if outcome.shape != (1, *shape):
        raise ValueError(f"its prediction has shape {list(outcome.shape)}, but prediction_shape says {[1, *shape]}")
    return outcome


def _lengths(request: DiffusionRequest, branch: int) -> tuple[int, int]:
    """Tokens of a branch's image (with its conditions) and text."""
    text_tokens = request.text_tokens[branch]
    return request.sequence_tokens(branch) - text_tokens, text_tokens
