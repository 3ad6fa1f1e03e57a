"""Whether an engine's ranks can serve, answered by a thread of the engine's process, which may be busy otherwise.

Must not import vLLM or torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import zmq

_SERVES, _STARTS_ANEW = b"serves", b"starts anew"


def answer_health(address: str, can_serve: Callable[[], bool]) -> None:
    """Answer whoever asks at `address`, as long as this process lives; `can_serve` is called in a thread."""
    threading.Thread(target=_answer, args=(address, can_serve), daemon=True, name="cfg-health").start()


def _answer(address: str, can_serve: Callable[[], bool]) -> None:
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.bind(address)
        while True:
            socket.recv()
            socket.send(_SERVES if can_serve() else _STARTS_ANEW)


def serves(address: str, timeout_ms: int) -> bool:
    """Ask an engine; False too if nobody answers within that time."""
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        socket.send(b"")
        return bool(socket.poll(timeout_ms)) and socket.recv() == _SERVES


def address_of(prefix: str, engine: int) -> str:
    """Where one of several engines answers."""
    return f"{prefix}-{engine}"
