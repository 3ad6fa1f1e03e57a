"""PNG files without the metadata for which Pillow refuses some: colour profiles and texts above a megabyte.

Nothing here reads colour profiles. Plain texts that say which way is up are kept. Must not import vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Iterator

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PROFILE, _TEXTS = b"iCCP", (b"tEXt", b"zTXt", b"iTXt")
_ORIENTED = b"XML:com.adobe.xmp\0\0"  # the second 0: not compressed
_MOST_BYTES = 2**20  # of a text that is kept


def without_metadata(data: bytes) -> bytes:
    """The same image; files of other formats are returned as they are."""
    if not data.startswith(_SIGNATURE):
        return data
    return _SIGNATURE + b"".join(chunk for chunk in _chunks(data) if _is_needed(chunk))


def _chunks(data: bytes) -> Iterator[bytes]:
    """Each one's length, kind, content and checksum; a length beyond the end means all that is left."""
    start = len(_SIGNATURE)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield data[start:end]
        start = end


def _is_needed(chunk: bytes) -> bool:
    kind = chunk[4:8]
    if kind in _TEXTS:
        return chunk.startswith(_ORIENTED, 8) and len(chunk) <= _MOST_BYTES
    return kind != _PROFILE
