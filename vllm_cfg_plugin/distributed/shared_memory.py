"""Collectives of one host's ranks through memory that they share; must not import vLLM or torch.distributed.

Every rank owns two slots, and exchange k uses slot k % 2 of every rank: a rank writes its row there, then the number k,
waits until the same slot of every other rank says k, and copies the rows out. Why two slots and no further barrier are
enough: a rank writes slot k % 2 again in exchange k + 2. It comes there after it has seen k + 1 from every other rank,
and a rank says k + 1 after it has copied all rows of exchange k. So nobody reads a slot while it is written, and a rank
that waits for k finds k there or the k - 2 before it, never more. With one slot, a rank that is fast would write
exchange k + 1 over the row that a slow one is still copying.

A rank that waits for long sleeps until it is rung for: after every row the writer puts a byte into each other rank's
pipe, its bell. Bytes that nobody waited for stay there and cost a later sleeper one more look.

Nothing of this has a name: slots are `memfd`s and bells are pipes, which the others open as /proc/<pid>/fd/<fd>. So
nothing is left behind however a rank ends, and a small /dev/shm is no limit. A rank that dies leaves the others
waiting, as in any collective: there is no time limit here, because whoever started the ranks ends them all when one
has ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Sequence
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_cfg_plugin.distributed.memory_slot import SMALLEST_BYTES, Slot
from vllm_cfg_plugin.distributed.sequence_group import MemberFailedError

# One small picklable object of every rank, in rank order; every rank must call it alike.
Share = Callable[[Any], list[Any]]

_FILES = 3  # that a rank opens of another: two slots and a bell

# A peer that comes soon is found sooner by looking than by being woken; other processes that want the core get it.
_SPIN_SECONDS = 200e-6
_PIPE_BYTES = 64 * 2**10


class _Address(NamedTuple):
    """Where a file can be opened: (device, inode) tells whether what is found there is that file."""

    pid: int
    fd: int
    file: tuple[int, int]


class SharedMemoryGather:
    """[row] of every rank -> [ranks, row], and an all-to-all, for CPU tensors of any dtype; made by `connect`.

    Some of the ranks may exchange among themselves while the others do so too: all ranks make every exchange, and each
    reads the rows of its own `members`.

    Args:
        slots: the two slots of every rank, in rank order.
        bell: this rank's, to listen to.
        ringing_ends: where to ring every rank's bell, in rank order; the own one is never rung, but its pipe would end
            without it.
    """

    def __init__(self, rank: int, slots: list[list[Slot]], bell: FileIO, ringing_ends: list[FileIO]) -> None:
        self._rank = rank
        self._slots = slots
        self._bell = bell
        self._ringing_ends = ringing_ends
        self._everybody = range(len(slots))
        self._exchange = 0
        self._poll = select.poll()
        self._poll.register(bell, select.POLLIN)

    def __call__(self, row: torch.Tensor, members: Sequence[int] | None = None) -> torch.Tensor:
        """Exchange rows; all ranks call this, members with the same width and dtype.

        Args:
            row: [width] of this rank.
            members: ranks whose rows this one wants, itself among them; None: all.

        Returns:
            [members, width], which nobody else writes to.
        """
        members = self._everybody if members is None else members
        row = row.detach().contiguous()
        rows = row.new_empty(len(members), row.numel())
        self._trade(row, rows, 0, members)
        return rows

    def all_to_all(self, parts: torch.Tensor, members: Sequence[int] | None = None) -> torch.Tensor:
        """[members, ...] to each of them -> [members, ...] from each, which nobody else writes to; all ranks alike.

        Raises:
            MemberFailedError: another rank called `fail`.
        """
        members = self._everybody if members is None else members
        parts = parts.detach().contiguous()
        received = torch.empty_like(parts)
        self._trade(parts, received, members.index(self._rank) * parts[0].nbytes, members)
        return received

    def fail(self) -> None:
        """Take part in the next exchange with nothing, so that it fails on the others."""
        slots = self._next_slots()
        slots[self._rank].fail(self._exchange)
        self._ring_the_others()
        for rank, slot in enumerate(slots):
            if rank != self._rank:
                self._wait_for(slot)

    def _next_slots(self) -> list[Slot]:
        self._exchange += 1
        return [pair[self._exchange % 2] for pair in self._slots]

    def _trade(self, sent: torch.Tensor, received: torch.Tensor, first: int, members: Sequence[int]) -> None:
        """One exchange: of every member's `sent` the bytes from `first` on, into `received`, [members, ...]."""
        slots = self._next_slots()
        row = _bytes_of(sent)
        slots[self._rank].write(self._exchange, row)
        self._ring_the_others()
        error: Exception | None = None
        for rank, slot in enumerate(slots):
            part = _bytes_of(received[members.index(rank)]) if rank in members else None
            if rank == self._rank and part is not None:
                part[:] = row[first : first + part.nbytes]
                continue
            self._wait_for(slot)  # for all of them, also after an error: so the ranks stay together
            try:
                if slot.has_failed():
                    raise MemberFailedError(rank)
                if part is None:
                    slot.pass_over()
                else:
                    slot.read_into(part, first, row.nbytes)
            except (MemberFailedError, RuntimeError) as caught:
                error = error or caught
        if error is not None:
            raise error

    def _ring_the_others(self) -> None:
        for rank, bell in enumerate(self._ringing_ends):
            if rank != self._rank:
                # A rank that found the row by looking may have ended since. A full pipe takes no byte and needs none.
                with contextlib.suppress(BrokenPipeError):
                    bell.write(b"\0")

    def _wait_for(self, slot: Slot) -> None:
        waiting_since = time.perf_counter()
        while not slot.holds(self._exchange):
            if time.perf_counter() - waiting_since < _SPIN_SECONDS:
                os.sched_yield()
            elif self._poll.poll():  # other threads of this process run meanwhile
                self._bell.read(_PIPE_BYTES)

    def close(self) -> None:
        """Give memory and pipes back; the memory is freed when the last rank has done so, or has ended."""
        for slot in chain.from_iterable(self._slots):
            slot.close()
        for bell in (self._bell, *self._ringing_ends):
            bell.close()


def connect(rank: int, ranks: int, share: Share) -> SharedMemoryGather | None:
    """Map the ranks' memory into each other; all ranks must call this together.

    Returns:
        None, and so on every rank, where some rank can't reach the memory of another: they run on different hosts or
        in containers that don't see each other's processes, or a system has no `memfd`.
    """
    with contextlib.ExitStack() as temporary:
        bell, files = _make_files()
        addresses = share((_host(), [_address_of(fd) for fd in files]))
        opened = [files if peer == rank else _open_files(*addresses[peer]) for peer in range(ranks)]
        for fds in opened:
            temporary.callback(_close_all, fds)
        # This second round also keeps every rank's files open until all have opened them.
        if not all(share(all(len(fds) == _FILES for fds in opened))):
            _close_all(bell)
            return None
        ringing_ends = [FileIO(fds.pop(), "w") for fds in opened]
        # A mapping keeps its file by itself.
        return SharedMemoryGather(rank, [[Slot(fd) for fd in fds] for fds in opened], FileIO(bell[0]), ringing_ends)


def _make_files() -> tuple[list[int], list[int]]:
    """This rank's bell, and what others open of it: two slots and the bell's other end; nothing without `memfd`."""
    if not hasattr(os, "memfd_create"):
        return [], []
    slots = [os.memfd_create("cfg-gather") for _ in range(2)]
    for fd in slots:
        os.ftruncate(fd, SMALLEST_BYTES)
    bell, ringing_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    return [bell], [*slots, ringing_end]


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _host() -> tuple[str, str]:
    """What processes have in common that see each other under the same pids."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""  # no /proc to open anything in: whether that is the same host makes no difference


def _address_of(fd: int) -> _Address:
    return _Address(os.getpid(), fd, _identity(os.fstat(fd)))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _open_files(host: tuple[str, str], addresses: list[_Address]) -> list[int]:
    """Another rank's files, as far as they can be opened."""
    opened: list[int] = []
    modes = (os.O_RDWR, os.O_RDWR, os.O_WRONLY | os.O_NONBLOCK)
    try:
        for (pid, fd, file), mode in zip(addresses, modes, strict=False) if host == _host() else ():
            path = f"/proc/{pid}/fd/{fd}"
            # Looked at before it is opened: under another process's number could be anything.
            if _identity(os.stat(path)) == file:
                opened.append(os.open(path, mode | os.O_CLOEXEC))
    except OSError:
        pass  # the caller counts them
    return opened


def _bytes_of(row: torch.Tensor) -> memoryview:
    return row.reshape(-1).view(torch.uint8).numpy().data
