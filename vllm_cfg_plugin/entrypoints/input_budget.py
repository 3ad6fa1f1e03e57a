"""What clients' inputs and answers may take of a server's memory, all requests together. Knows no HTTP.

Must not import vLLM.
"""

from __future__ import annotations

import ctypes
from types import TracebackType

from vllm_cfg_plugin.errors import InvalidRequestError, ServerBusyError

_FLAG = "--max-input-bytes-in-flight"
_LARGE = 2**26  # trimming takes 20 ms


class InputBudget:
    """Bytes of the inputs of all requests that are being read or are in the engine, and of answers on their way.

    Attributes:
        limit: most of them.
        held: how many there are.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0


class InputHold:
    """One request's share of a budget: it grows while the request is read, and goes back when its last user leaves.

    A user is a `with` block: that of the HTTP request, and that of the job that goes on after its answer.
    """

    def __init__(self, budget: InputBudget) -> None:
        self._budget = budget
        self._size = 0
        self._users = 0

    def check(self, size: int, param: str) -> None:
        """Whether so many more bytes have room; nothing is held for them.

        Raises:
            InvalidRequestError: they are more than the whole limit; names `param`.
            ServerBusyError: they have no room while others hold theirs.
        """
        limit = self._budget.limit
        if self._size + size > limit:
            allowed = f"smaller: more than the {limit} bytes that all inputs may take on this server ({_FLAG})"
            raise InvalidRequestError(param, f"{self._size + size} bytes with all copies", allowed)
        if self._budget.held + size > limit:
            raise ServerBusyError(
                f"other requests' inputs, and answers that clients have yet to read, leave no room for {size} bytes "
                f"more: all together may take {limit} bytes ({_FLAG}); try again later"
            )

    def add(self, size: int, param: str) -> None:
        """Hold so many bytes more; raises as `check`."""
        self.check(size, param)
        self.count(size)

    def count(self, size: int) -> None:
        """Hold so many bytes more, or fewer, that are there already, whether or not there is room for them."""
        self._size += size
        self._budget.held += size

    def __enter__(self) -> InputHold:
        self._users += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._users -= 1
        if not self._users:
            self._budget.held -= self._size
            if self._size >= _LARGE:
                _trim_heap()
            self._size = 0


def _trim_heap() -> None:
    """Have glibc hand freed memory back to the system: of images that were decoded it keeps half, for no use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
