"""The C library's memory policy of a rank that computes on a CPU; must not import vLLM or torch."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEEP_BYTES = 2**30


def keep_freed_memory() -> None:
    """Have glibc keep up to 1 GiB of freed memory for the next tensors, where another C library keeps its own way.

    By default tensors of some hundred KB and more go back to the system after every operation, and each page is
    faulted in and zeroed again by the next: up to a fifth of a forward's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
