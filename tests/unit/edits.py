"""Models that edit images, image files and the forms that bring them; shared by the tests of edits."""

import io
import struct
import zlib
from dataclasses import replace

from msgspec import structs
from PIL import Image

from tests.unit.fakes import INFO
from tests.unit.http_app import EDITS, send

EDIT_INFO = replace(
    INFO, min_images=1, max_images=3, condition_tokens=lambda sizes: (sum(w * h // 64 for w, h in sizes), 5)
)
LAYERED_INFO = replace(
    EDIT_INFO,
    max_images=1,
    options=frozenset({"layers"}),
    default_params=structs.replace(INFO.default_params, layers=4),
)


def image_file(color=(10, 20, 30), size=(16, 8), image_format="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, image_format)
    return buffer.getvalue()


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be this large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


CAT, DOG = image_file((250, 0, 0)), image_file((0, 0, 250), (8, 8), "JPEG")


def edit(app, fields=None, files=(("image", ("cat.png", CAT)),)):
    """A form with a good prompt; a list among the fields is a repeated one, None leaves one out."""
    fields = {"prompt": "a hat", "seed": "5"} | (fields or {})
    return send(app, EDITS, data={k: v for k, v in fields.items() if v is not None}, files=list(files))


def assert_refused(response, param, *words):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["code"] == 400
    for word in ("is not valid: ", *words):
        assert word in error["message"]
