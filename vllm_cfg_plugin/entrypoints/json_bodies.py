"""JSON bodies that hold images, and what is wrong with those that Python can't read. Knows no vLLM."""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any

from fastapi import Request

from vllm_cfg_plugin.entrypoints.forms import UploadedFile
from vllm_cfg_plugin.errors import InvalidRequestError

# Of a JSON body, counted by its brackets and commas, those in prompts too. An image is one of them; of 256 MB of other
# values Python would make gigabytes of objects.
_MOST_VALUES = 100_000
# Python reads no integer of more digits.
_LONG_NUMBER = re.compile(rb'(?:"([^"\\]{1,100})"\s*:\s*)?-?[0-9]{4301}')


def is_json(request: Request) -> bool:
    return "json" in request.headers.get("content-type", "").partition(";")[0].lower()


async def read_json(request: Request) -> dict[str, Any]:
    """The fields of a JSON object.

    Raises:
        InvalidRequestError: the body is something else.
    """
    body = await request.body()
    if sum(body.count(mark) for mark in (b"[", b"{", b",")) > _MOST_VALUES:
        raise InvalidRequestError("body", f"{len(body)} bytes of JSON", f"of at most {_MOST_VALUES} values")
    try:
        fields = json.loads(body)
    # Of bytes that are not text too, of numbers too long to parse and of too many brackets in brackets.
    except (ValueError, RecursionError):
        raise unreadable(body) from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("body", fields, "a form, or a JSON object")
    return fields


def unreadable(body: bytes) -> InvalidRequestError:
    """Why Python can't read a body."""
    number = _LONG_NUMBER.search(body)
    if number is None:
        return InvalidRequestError("body", None, "valid JSON")
    name = (number[1] or b"body").decode(errors="replace")
    return InvalidRequestError(name, "a number of more than 4300 digits", "shorter")


def referenced_file(reference: object, param: str) -> bytes:
    """An uploaded file, a data URL, or OpenAI's reference object with one.

    Raises:
        InvalidRequestError: it is something else.
    """
    if isinstance(reference, UploadedFile):
        return reference.data
    url = reference.get("image_url") if isinstance(reference, dict) else reference
    if isinstance(url, dict):  # as in chats
        url = url.get("url")
    if isinstance(url, str) and url.startswith("data:") and ";base64," in url:
        try:
            return base64.b64decode(url.partition(";base64,")[2], validate=True)
        except binascii.Error as error:
            raise InvalidRequestError(param, url, f"base64 that can be decoded: {error}") from None
    allowed = 'an uploaded file, or {"image_url": "data:image/png;base64,..."}: this server fetches and stores nothing'
    raise InvalidRequestError(param, reference, allowed)
