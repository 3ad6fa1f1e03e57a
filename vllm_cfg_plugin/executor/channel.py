"""The message kinds between executor and workers, and how a rank is named on the socket. Must import nothing.

Every message is `[kind, payload, frames...]`. To a worker: PLAN (msgpack `StepPlan`), CALL (cloudpickled method call),
PING, STOP. From a worker: READY, FAILED (UTF-8 text) while it starts, then REPORT (msgpack `StepReport`), ANSWER
(cloudpickled), PONG, and SIDE (msgpack `SideReport`, and a frame of pixels if it brings an image), unasked and from
sockets of its side threads.
"""

from __future__ import annotations

PLAN = b"plan"
CALL = b"call"
PING = b"ping"
STOP = b"stop"
READY = b"ready"
FAILED = b"failed"
REPORT = b"report"
ANSWER = b"answer"
PONG = b"pong"
SIDE = b"side"


def identity(rank: int) -> bytes:
    """The name of a rank's socket; those of its side threads append `-` and a name of their own."""
    return b"rank%d" % rank


def rank_of(identity: bytes) -> int:
    """Which rank's socket has this name."""
    return int(identity[4:].partition(b"-")[0])
