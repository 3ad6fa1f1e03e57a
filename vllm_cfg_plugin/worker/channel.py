"""The message kinds between executor and workers, and how a rank is named on the socket. Must import nothing.

Every message is `[kind, payload, frames...]`. To a worker: PLAN (msgpack `StepPlan`), CALL (cloudpickled method call),
STOP.
From a worker: READY, FAILED (UTF-8 text) while it starts, then REPORT (msgpack `StepReport` and one frame of pixels per
decoded image) and ANSWER (cloudpickled).
"""

from __future__ import annotations

PLAN = b"plan"
CALL = b"call"
STOP = b"stop"
READY = b"ready"
FAILED = b"failed"
REPORT = b"report"
ANSWER = b"answer"


def identity(rank: int) -> bytes:
    return b"rank%d" % rank


def rank_of(identity: bytes) -> int:
    return int(identity[4:])
