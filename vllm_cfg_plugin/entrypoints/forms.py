"""Bodies of HTTP requests: how long they may be, and multipart/form-data as OpenAI's clients write it. Knows no vLLM.

The clients write `a[b]` for a field in a field and `a[]` for an item of a list; texts stay texts here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from vllm_cfg_plugin.entrypoints.input_budget import InputHold
from vllm_cfg_plugin.errors import InvalidRequestError

MOST_TEXT_BYTES = 2**20  # of a body without images: two prompts of 32000 characters, each written as \ud83d\ude00
MULTIPART = "multipart/form-data"

# name, name[inner], name[] or name[0], name[inner][]; other names stand for themselves.
_NAME = re.compile(r"([^\[\]]+)(?:\[([^\[\]]*[^\[\]0-9][^\[\]]*)\])?(\[[0-9]*\])?")


@dataclass(frozen=True)
class UploadedFile:
    """A file of a form. Its content type is not kept, clients rarely know it."""

    filename: str
    data: bytes

    def __str__(self) -> str:
        return f"file {self.filename or 'without a name'}, {len(self.data)} bytes"


def limit_body(request: Request, limit: int, hold: InputHold) -> Request:
    """The same request, which refuses to be read beyond `limit` bytes, or for longer than `hold` has room for it.

    Raises:
        InvalidRequestError: it announces more.
        ServerBusyError: it announces more than there is room for now.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal():
        if int(announced) > limit:
            raise _too_long(int(announced), limit)
        hold.check(int(announced), "body")
    return Request(request.scope, _limited(request.receive, limit, hold))


def _limited(receive: Receive, limit: int, hold: InputHold) -> Receive:
    received = 0

    async def receive_within_limit() -> Message:
        nonlocal received
        message = await receive()
        size = len(message.get("body", b""))
        received += size
        if received > limit:
            raise _too_long(received, limit)
        # As it comes: who announces much and sends little must not keep others out.
        hold.add(size, "body")
        return message

    return receive_within_limit


def _too_long(size: int, limit: int) -> InvalidRequestError:
    rule = f"(--max-upload-bytes, and at most {MOST_TEXT_BYTES} without images)"
    return InvalidRequestError("body", f"{size} bytes or more", f"of at most {limit} bytes {rule}")


async def read_form(request: Request) -> dict[str, Any]:
    """The fields of a form: texts, `UploadedFile`s, and lists and dicts of them.

    Raises:
        InvalidRequestError: the body is something else.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != MULTIPART:
        allowed = f"sent as {MULTIPART}, with files as parts of it, or as application/json"
        raise InvalidRequestError("body", content_type or None, allowed)
    try:
        async with request.form() as form:
            return nest_fields([(name, await _content(part)) for name, part in form.multi_items()])
    except HTTPException as error:  # Starlette's word for a body that it can't take apart
        raise InvalidRequestError("body", content_type, f"a form that can be parsed: {error.detail}") from None


async def _content(part: UploadFile | str) -> UploadedFile | str:
    if isinstance(part, str):
        return part
    return UploadedFile(part.filename or "", await part.read())


def files_in(value: Any, param: str, read: Callable[[Any, str], bytes]) -> list[bytes] | bytes | None:
    """The file or the files in a field of a form, which came once or several times; None of a field that did not come.

    Args:
        read: (value, name of the field) -> file.
    """
    if isinstance(value, list):
        return [read(item, f"{param}[{index}]") for index, item in enumerate(value)]
    return None if value in (None, "") else read(value, param)


def uploaded_file(value: object, param: str) -> bytes:
    """The bytes of an uploaded file.

    Raises:
        InvalidRequestError: it is something else.
    """
    if not isinstance(value, UploadedFile):
        raise InvalidRequestError(param, value, "an uploaded file: a part of the form that has a filename")
    return value.data


def nest_fields(parts: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """[("a[b]", x), ("c[]", y)] -> {"a": {"b": x}, "c": [y]}; `c[0]`, `c[1]` and a repeated `c` are lists too.

    Raises:
        InvalidRequestError: a name is that of a value and of a group of fields.
    """
    fields: dict[str, Any] = {}
    for name, value in parts:
        match = _NAME.fullmatch(name)
        base, inner, item = match.groups() if match else (name, None, None)
        group, key = (fields, base) if inner is None else (fields.setdefault(base, {}), inner)
        if not isinstance(group, dict):
            raise InvalidRequestError(name, value, f"absent where {base} itself is given")
        if item or key in group:
            before = group.get(key, [])
            group[key] = [*(before if isinstance(before, list) else [before]), value]
        else:
            group[key] = value
    return fields
