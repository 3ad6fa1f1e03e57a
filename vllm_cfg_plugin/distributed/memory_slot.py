"""A row of bytes and its number in memory that processes share: one writes, the others read.

Must import nothing heavy.
"""

from __future__ import annotations

import mmap
import threading

_HEADER_BYTES = 64  # two int64, exchange number and bytes of the row, in a cache line of their own
_EXCHANGE, _ROW_BYTES = 0, 1
_FAILED = -1  # in place of a number of bytes
SMALLEST_BYTES = _HEADER_BYTES + 64 * 2**10  # of a slot's file

_fence_lock = threading.Lock()


class Slot:
    """One rank's row of every second exchange: its own to write, or another's to read."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, SMALLEST_BYTES)
        self._look()

    def _look(self) -> None:
        self._bytes = memoryview(self._memory)
        # Aligned native words are loaded and stored in one instruction.
        self._words = self._bytes[:_HEADER_BYTES].cast("q")

    def write(self, exchange: int, row: memoryview) -> None:
        self._grow(row.nbytes)
        self._bytes[_HEADER_BYTES : _HEADER_BYTES + row.nbytes] = row
        self._say(exchange, row.nbytes)

    def fail(self, exchange: int) -> None:
        """Say in place of a row that there is none."""
        self._say(exchange, _FAILED)

    def _say(self, exchange: int, row_bytes: int) -> None:
        self._words[_ROW_BYTES] = row_bytes
        _fence_memory()
        self._words[_EXCHANGE] = exchange

    def holds(self, exchange: int) -> bool:
        return self._words[_EXCHANGE] == exchange

    def has_failed(self) -> bool:
        """Whether there is no row; the slot holds the exchange that is wanted."""
        _fence_memory()
        return self._words[_ROW_BYTES] == _FAILED

    def read_into(self, part: memoryview, first: int, row_bytes: int) -> None:
        """Copy bytes of the row out, from byte `first` on; the slot holds the exchange that is wanted.

        Raises:
            RuntimeError: the other rank's row has another length.
        """
        _fence_memory()
        sent = self._words[_ROW_BYTES]
        if sent != row_bytes:
            raise RuntimeError(
                f"another rank sent a row of {sent} bytes where this one sent {row_bytes}: all ranks must call the "
                "gather with rows of one width and dtype"
            )
        self._grow(sent)
        start = _HEADER_BYTES + first
        part[:] = self._bytes[start : start + part.nbytes]

    def pass_over(self) -> None:
        """Read nothing of the row. The file's size is followed all the same, or a later reading would shrink it."""
        _fence_memory()
        self._grow(self._words[_ROW_BYTES])

    def _grow(self, row_bytes: int) -> None:
        """Make room for a row. The owner comes first and enlarges the file; a reader then sets the size that it has."""
        if _HEADER_BYTES + row_bytes > len(self._memory):
            self._hide()
            self._memory.resize(_HEADER_BYTES + (1 << (row_bytes - 1).bit_length()))
            self._look()

    def _hide(self) -> None:
        self._words.release()
        self._bytes.release()

    def close(self) -> None:
        self._hide()
        self._memory.close()


def _fence_memory() -> None:
    """Keep what was read and written before this call before what is read and written after it, for all processes.

    Processors other than x86 may reorder them. A lock's release holds back what comes before it and its acquisition
    what comes after it, so it takes a release that is followed by an acquisition: the lock is taken twice.
    """
    with _fence_lock:
        pass
    with _fence_lock:
        pass
