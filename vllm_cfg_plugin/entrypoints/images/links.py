"""Finished images under links that nobody can guess and that expire: `response_format="url"`. Knows no HTTP.

The API servers of one `vllm serve` share a folder, so each of them finds what any of them has made. Must not import
vLLM or torch.
"""

from __future__ import annotations

import re
import secrets
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vllm_cfg_plugin.entrypoints.images.schema import ImageFormat

KEEP_SECONDS = 3600
MAX_BYTES = 2**30  # of one API server

_NAME = re.compile(r"[A-Za-z0-9_-]{43}\.(png|jpeg|webp)")


class ImageLinks:
    """The files of one API server, and the way to those of its neighbours.

    Args:
        shared: a name that the API servers have in common.
        keep_seconds: how long a file is there.
        max_bytes: of this server's files, of which the oldest go first; the last one is kept always.
        now: the clock, seconds since 1970.
    """

    def __init__(
        self,
        shared: str,
        keep_seconds: int = KEEP_SECONDS,
        max_bytes: int = MAX_BYTES,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._folder = Path(tempfile.gettempdir()) / f"vllm-cfg-images-{shared}"
        self._keep_seconds = keep_seconds
        self._max_bytes = max_bytes
        self._now = now
        self._files: dict[Path, tuple[float, int]] = {}  # when each was made, and its bytes; oldest first
        weakref.finalize(self, _remove, self._folder, self._files)  # at exit too

    def add(self, data: bytes, image_format: ImageFormat) -> str:
        """Keep a file; returns its name, to be written after the route's path.

        Raises:
            OSError: it can't be written.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._folder / f"{secrets.token_urlsafe(32)}.{image_format}"
        path.write_bytes(data)
        self._files[path] = self._now(), len(data)
        self._forget_old()
        return path.name

    def find(self, name: str) -> Path | None:
        """The file of a link, or None where there is none, or none any more."""
        self._forget_old()
        path = self._folder / name
        with suppress(OSError):
            if _NAME.fullmatch(name) and self._now() - path.stat().st_mtime <= self._keep_seconds:
                return path
        return None

    def _forget_old(self) -> None:
        stored = sum(size for _, size in self._files.values())
        for path, (made, size) in list(self._files.items()):
            is_too_much = stored > self._max_bytes and len(self._files) > 1
            if not is_too_much and self._now() - made <= self._keep_seconds:
                break
            stored -= size
            del self._files[path]
            path.unlink(missing_ok=True)


def _remove(folder: Path, files: dict[Path, tuple[float, int]]) -> None:
    for path in files:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # a neighbour's files are there, or none ever was
        folder.rmdir()
