"""The messages between the engine and its ranks: one step plan out, one step report per rank back.

Ids and integers only: a prompt travels once, in the plan that admits its request; tensors never travel towards a rank,
    and decoded pixels follow a report as raw frames. Must not import torch or vLLM.
"""

from __future__ import annotations

import msgspec

from vllm_cfg_plugin.params import DiffusionRequest


class Admission(msgspec.Struct, array_like=True, frozen=True):
    """A request joins; every rank draws its noise and makes its noise scheduler. `id` names it in all later plans."""

    id: int
    request: DiffusionRequest


class Forward(msgspec.Struct, array_like=True, frozen=True):
    """Denoising step `index` of request `id`; cfg rank `owners[b]` computes branch b and encodes its prompt."""

    id: int
    index: int
    owners: tuple[int, ...]


class Decode(msgspec.Struct, array_like=True, frozen=True):
    """After its last step, cfg rank `rank` turns the latents of request `id` into pixels and all ranks forget it."""

    id: int
    rank: int


class StepPlan(msgspec.Struct, array_like=True, frozen=True):
    """All work of one engine step, the same message for every rank; carried out in the order of the fields.

    Forwards and decodes name only requests that were admitted and neither retired nor decoded: the ranks rely on it.
    """

    step: int
    retire: list[int]
    admit: list[Admission]
    forwards: list[Forward]
    decodes: list[Decode]

    def is_empty(self) -> bool:
        return not (self.retire or self.admit or self.forwards or self.decodes)


class DecodedImage(msgspec.Struct, array_like=True, frozen=True):
    """One decoded image; its pixels are the report's frame of the same position: uint8 [height, width, 3]."""

    id: int
    height: int
    width: int
    decode_ms: float


class StepReport(msgspec.Struct, array_like=True, frozen=True):
    """What one rank did in one step.

    Attributes:
        began, denoised: this rank's `time.monotonic()` at the start of the step and after its last noise-scheduler
            step.
        encoded: (request id, milliseconds) of the texts encoded.
        failed: (request id, message) of requests that can't go on.
    """

    step: int
    rank: int
    began: float
    denoised: float
    encoded: list[tuple[int, float]]
    failed: list[tuple[int, str]]
    images: list[DecodedImage]


encode = msgspec.msgpack.Encoder().encode
decode_plan = msgspec.msgpack.Decoder(StepPlan).decode
decode_report = msgspec.msgpack.Decoder(StepReport).decode
