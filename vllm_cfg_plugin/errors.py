"""Every exception that leaves this package; must import nothing but the standard library.

CfgPluginError
├── InvalidRequestError (ValueError)   one request is wrong: HTTP 400, `ValueError` offline
├── InputsRefusedError  (ValueError)   a pipeline of diffusers refuses its inputs: HTTP 400, `.error` offline
├── ModelNotFoundError  (ValueError)   the request names another model: HTTP 404
├── VideoNotFoundError  (LookupError)  the request names a video that is not here: HTTP 404
├── ConfigurationError  (ValueError)   the server can't start as configured
├── RequestFailedError                 the request was right and failed while running: HTTP 500, `.error` offline
├── RequestAbortedError                the engine stopped or paused before it was done: HTTP 503, `.error` offline
├── ServerBusyError                    the request is right and there is no room for it now: HTTP 429
└── RankDiedError       (RuntimeError) a cfg rank's process ended, and may not be started again: the engine stops
    └── RanksRestartedError            the ranks were started anew during a call of a method of theirs: call it again
"""

from __future__ import annotations

import json

# How long a refused client should wait. When there will be room depends on what others send by then, so this is a
# constant: short beside most images, long beside an answer of ours.
RETRY_AFTER_S = 2

__all__ = [
    "CfgPluginError",
    "ConfigurationError",
    "InputsRefusedError",
    "InvalidRequestError",
    "ModelNotFoundError",
    "RankDiedError",
    "RanksRestartedError",
    "RequestAbortedError",
    "RequestFailedError",
    "ServerBusyError",
    "VideoNotFoundError",
    "one_line",
]


class CfgPluginError(Exception):
    """Base of all errors of this package."""


class InvalidRequestError(CfgPluginError, ValueError):
    """A request field has a value that can't be served.

    Args:
        param: the field's name as the user wrote it, e.g. ``"size"``; OpenAI's ``error.param``.
        value: what was sent.
        allowed: what would have been right, e.g. ``"an integer from 1 to 10"``, or ``"absent: ..."`` with the reason.
    """

    def __init__(self, param: str, value: object, allowed: str) -> None:
        self.param, self.value, self.allowed = param, value, allowed
        is_unwanted = allowed.startswith("absent")
        rule = f"leave it out{allowed.removeprefix('absent')}" if is_unwanted else f"it must be {allowed}"
        super().__init__(f"{param}={_shown(value)} is not valid: {rule}")

    def renamed(self, param: str) -> InvalidRequestError:
        """The same error of a field that the user knows by another name."""
        return InvalidRequestError(param, self.value, self.allowed)

    def within(self, path: str) -> InvalidRequestError:
        """The same error of a field that is inside something else, e.g. path ``"prompts[2]."``."""
        return _rebuild_invalid_request(f"{path}{self.param}", f"{path}{self}")

    def __reduce__(self) -> tuple[object, ...]:
        # Three constructor arguments became one message; pickling by message alone would fail to rebuild.
        return (_rebuild_invalid_request, (self.param, str(self)))


def _shown(value: object) -> str:
    """A value as a user writes it: JSON, or of other objects what they are."""
    if value is None or isinstance(value, (str, bool, int, float, list, tuple, dict)):
        try:
            shown = json.dumps(value, ensure_ascii=False, default=_described)
        except (TypeError, ValueError):  # keys that JSON lacks, a circle, a number of thousands of digits
            shown = f"({type(value).__name__})"
    else:
        shown = _described(value)
    shown = shown.encode(errors="backslashreplace").decode()  # halves of characters, which no answer can hold
    return shown if len(shown) <= 100 else f"{shown[:100]}... ({len(shown)} characters)"


def _described(value: object) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    has_words = type(value).__str__ is not object.__str__
    return str(value) if has_words else f"({type(value).__name__})"


def _rebuild_invalid_request(param: str, message: str) -> InvalidRequestError:
    error = InvalidRequestError.__new__(InvalidRequestError, message)
    error.param = param
    return error


class InputsRefusedError(CfgPluginError, ValueError):
    """A request has inputs that the pipeline of diffusers refuses, which nobody could tell before it ran."""


class ModelNotFoundError(CfgPluginError, ValueError):
    """The request names a model that this server doesn't serve."""


class VideoNotFoundError(CfgPluginError, LookupError):
    """The request names a video that this server does not have, or no longer."""


class ConfigurationError(CfgPluginError, ValueError):
    """The engine can't be started with these arguments or this checkpoint."""


class RequestFailedError(CfgPluginError):
    """A valid request failed while it was running; other requests go on."""


class RequestAbortedError(CfgPluginError):
    """A valid request was dropped because the engine stopped or paused; sending it again later may work."""


class ServerBusyError(CfgPluginError):
    """There is no room for a valid request now; sending it again later may work.

    Attributes:
        retry_after: seconds after which to try again.
    """

    retry_after = RETRY_AFTER_S


class RankDiedError(CfgPluginError, RuntimeError):
    """The process of a cfg rank ended without being asked to."""


class RanksRestartedError(RankDiedError):
    """The cfg ranks were started anew during a call: what it did is undone."""


def one_line(error: BaseException) -> str:
    """An error for a message that crosses processes: ours by its text alone, others with their class."""
    text = str(error) if isinstance(error, CfgPluginError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
