"""The messages between the engine and its ranks: step plans out, step reports and side reports back.

A plan says what changes; a request that runs takes its next step with every plan that advances, so the plan of a
steady batch is a few bytes. Ids and integers only: prompts and images travel once, in the plan that admits their
request; decoded pixels follow their report as a raw frame. No tensor travels towards a rank, but for embeddings where
one rank alone has the text encoders. Must not import torch or vLLM.
"""

from __future__ import annotations

import msgspec

from vllm_cfg_plugin.params import DiffusionRequest


class Admission(msgspec.Struct, array_like=True, frozen=True):
    """A request joins; every rank draws its noise and makes its noise scheduler. `id` names it in all later plans.

    Attributes:
        kept: of a request that earlier ranks have worked on, where it goes on; see `worker/kept_state.py`.
    """

    id: int
    request: DiffusionRequest
    kept: bytes = b""


class Encode(msgspec.Struct, array_like=True, frozen=True):
    """Cfg rank `rank` encodes the text of a branch, beside the steps, and says so in a side report.

    Attributes:
        is_long: it may take longer than a step, so no short work may wait for it.
        is_shared: its embeddings follow the report, for ranks that have no text encoders.
    """

    id: int
    branch: int
    rank: int
    is_long: bool = False
    is_shared: bool = False


class Embeds(msgspec.Struct, array_like=True, frozen=True):
    """Cfg ranks `ranks` take over what another rank encoded, and each says so in a side report as if it had encoded it.

    Attributes:
        data: see `worker/embeds.py`.
    """

    id: int
    branch: int
    ranks: tuple[int, ...]
    data: bytes


class Assign(msgspec.Struct, array_like=True, frozen=True):
    """From this plan on cfg rank `owners[b]` forwards branch b, and further branches are not forwarded.

    A request runs from its first assignment on. Where its cache stands in for all forwards there are no owners; with
    None in their place it takes no step until it is assigned again.
    """

    id: int
    owners: tuple[int, ...] | None


class Decode(msgspec.Struct, array_like=True, frozen=True):
    """After its last step, in this plan, all ranks forget request `id`; `rank` decodes it beside the steps.

    Attributes:
        is_long: as an encode's.
        is_tiled: as a whole it is predicted to have no room.
    """

    id: int
    rank: int
    is_long: bool = False
    is_tiled: bool = False


class Preview(msgspec.Struct, array_like=True, frozen=True):
    """After its step in this plan `rank` decodes what request `id` is heading for, beside the steps.

    Attributes:
        is_long: as an encode's.
        is_tiled: as a whole it is predicted to have no room.
    """

    id: int
    rank: int
    is_long: bool = False
    is_tiled: bool = False


class Forward(msgspec.Struct, array_like=True, frozen=True):
    """For the next step of a long request cfg rank `owners[b]` forwards branch b, beside the steps.

    Each of these ranks says so in one side report, and keeps its predictions until a plan names the request in
    `long_steps`.
    """

    id: int
    owners: tuple[int, ...]


class StepPlan(msgspec.Struct, array_like=True, frozen=True):
    """All changes of one engine step, the same message for every rank.

    Carried out in the order of the fields, but for `long_steps` and `previews`, which go with `advance`.

    Attributes:
        advance: every running request takes one denoising step, and one that has taken its last runs no more.
        long_steps: long requests whose forwards are done; they take a denoising step in the same exchange.
        forwards: of long requests, for the step after that.
        previews: of requests that take a step.
        embeds: in the place of encodes.
    """

    step: int
    retire: list[int]
    admit: list[Admission]
    encodes: list[Encode]
    assign: list[Assign]
    advance: bool
    decodes: list[Decode]
    long_steps: list[int] = []
    forwards: list[Forward] = []
    previews: list[Preview] = []
    embeds: list[Embeds] = []

    def is_empty(self) -> bool:
        return not (
            self.advance
            or self.retire
            or self.admit
            or self.encodes
            or self.assign
            or self.decodes
            or self.long_steps
            or self.forwards
            or self.embeds
        )


class StepReport(msgspec.Struct, array_like=True, frozen=True):
    """What one rank did in one step.

    Attributes:
        began, denoised: this rank's `time.monotonic()` at the start of the step and after its last noise-scheduler
            step.
        failed: (request id, message) of requests that can't go on.
    """

    step: int
    rank: int
    began: float
    denoised: float
    failed: list[tuple[int, str]]


class SideReport(msgspec.Struct, array_like=True, frozen=True):
    """One encode, decode, preview or long request's forward is done; sent when it is, whatever the steps do.

    Attributes:
        branch: the branch that was encoded; DECODED for a decode, FORWARDED for all of a rank's branches of a step;
            PREVIEWED for a preview; KEPT when a frame follows that lets the request go on from here after a restart of
            the ranks.
        error: why it could not be done; '' if it was.
        is_refused: the error is one of the request's inputs.
        shape: of what was decoded, whose pixels follow as one frame: uint8 [number, height, width, channels]; of what
            is kept the steps taken; of shared embeddings [bytes].
    """

    id: int
    branch: int
    rank: int
    milliseconds: float
    error: str = ""
    shape: tuple[int, ...] = ()
    is_refused: bool = False


DECODED = -1
FORWARDED = -2
KEPT = -3
PREVIEWED = -4

encode = msgspec.msgpack.Encoder().encode
decode_plan = msgspec.msgpack.Decoder(StepPlan).decode
decode_report = msgspec.msgpack.Decoder(StepReport).decode
decode_side_report = msgspec.msgpack.Decoder(SideReport).decode
