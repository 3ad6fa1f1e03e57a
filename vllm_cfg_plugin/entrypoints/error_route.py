"""How our errors look on the wire: OpenAI's error object with `param`, on every route of ours."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.utils import sanitize_message

from vllm_cfg_plugin.entrypoints import metrics, tracing
from vllm_cfg_plugin.entrypoints.fields import schema_error
from vllm_cfg_plugin.entrypoints.forms import MOST_TEXT_BYTES, limit_body
from vllm_cfg_plugin.entrypoints.input_budget import InputHold
from vllm_cfg_plugin.entrypoints.json_bodies import unreadable
from vllm_cfg_plugin.errors import (
    CfgPluginError,
    InputsRefusedError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestAbortedError,
    ServerBusyError,
    VideoNotFoundError,
)

_PIECE_BYTES = 2**18


class OpenAIErrorRoute(APIRoute):
    """A route whose wrong bodies and failed requests are answered with OpenAI's error object.

    FastAPI's own answer to a wrong body names fields as "body.n" and dumps pydantic's list; other errors stay vLLM's.
    No body is read beyond what the operator allows, `max_upload_bytes` and `input_budget` of the application's state,
    nor while the engine's queue is full. The request's part of that budget is its `state.hold`, until its answer.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the answer too, until its client has read it."""
        with InputHold(scope["app"].state.input_budget) as answer:
            await super().handle(scope, receive, _in_pieces(send, answer))

    def most_bytes(self, allowed: int) -> int:
        """Of a body, where the operator allows so many."""
        return allowed

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_with_errors(request: Request) -> Response:
            state = request.app.state
            tracing.take_over(request.headers)
            request.state.hold = InputHold(state.input_budget)
            with request.state.hold as hold:
                limited = request
                try:
                    if request.method == "POST":
                        state.engine_calls.check_room()
                    limited = limit_body(request, self.most_bytes(state.max_upload_bytes), hold)
                    return await handle(limited)
                except RequestValidationError as errors:
                    return error_response(schema_error(errors.errors()[0]))
                except HTTPException as error:  # what FastAPI makes of a body that it can't read, parse or decode
                    cause = error.__cause__
                    return error_response(
                        cause if isinstance(cause, CfgPluginError) else unreadable(await limited.body())
                    )
                except CfgPluginError as error:
                    _forget_frames(error)
                    return error_response(error)
                except ClientDisconnect:  # during an upload; nobody reads the answer
                    return Response(status_code=HTTPStatus.BAD_REQUEST)

        return handle_with_errors


class TextRoute(OpenAIErrorRoute):
    """A route whose bodies hold no images. FastAPI makes objects of a JSON body, of up to forty times its length."""

    def most_bytes(self, allowed: int) -> int:
        return min(allowed, MOST_TEXT_BYTES)


def _in_pieces(send: Send, hold: InputHold) -> Send:
    """The server takes a piece when the last one is on its way, and would take a whole body at once."""

    async def send_in_pieces(message: Message) -> None:
        body = message.get("body", b"")
        hold.count(len(body))
        *pieces, last = range(0, len(body), _PIECE_BYTES) or [0]
        for start in pieces:
            await send({**message, "body": body[start : start + _PIECE_BYTES], "more_body": True})
        await send({**message, "body": body[last:]} if body else message)
        hold.count(-len(body))

    return send_in_pieces


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the code held where it failed: pixels. The task that failed keeps the error, and its frames that
    task, so a traceback would keep all of it until the garbage collector finds the circle, minutes later.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


def error_response(error: CfgPluginError) -> JSONResponse:
    """Status and OpenAI error object of one of our errors."""
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, ServerBusyError) else None
    content = error_body(error)
    metrics.note_refusal(content["error"]["code"])
    return JSONResponse(content, status_code=content["error"]["code"], headers=headers)


def error_body(error: Exception) -> dict[str, Any]:
    """OpenAI's error object; its `code` is the HTTP status of what it answers."""
    param: str | None = None
    if isinstance(error, InvalidRequestError):
        status, kind, param = HTTPStatus.BAD_REQUEST, "BadRequestError", error.param
    elif isinstance(error, InputsRefusedError):
        status, kind = HTTPStatus.BAD_REQUEST, "BadRequestError"
    elif isinstance(error, ModelNotFoundError):
        status, kind, param = HTTPStatus.NOT_FOUND, "NotFoundError", "model"
    elif isinstance(error, VideoNotFoundError):
        status, kind, param = HTTPStatus.NOT_FOUND, "NotFoundError", "video_id"
    elif isinstance(error, ServerBusyError):
        status, kind = HTTPStatus.TOO_MANY_REQUESTS, "RateLimitError"
    elif isinstance(error, RequestAbortedError):
        status, kind = HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"
    else:
        status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError"
    # vLLM cuts paths out of messages. What a client or the operator wrote, the served model's name too, stays whole.
    message = str(error) if status < HTTPStatus.INTERNAL_SERVER_ERROR else sanitize_message(str(error))
    return {"error": {"message": message, "type": kind, "param": param, "code": status.value}}


async def answer_unknown_route(request: Request, error: Exception) -> JSONResponse:
    """What Starlette's router raises, and routes of ours with a reason: nobody else answers with an error object."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    reason = {
        HTTPStatus.NOT_FOUND: "there is no such route; GET /openapi.json lists those that there are",
        HTTPStatus.METHOD_NOT_ALLOWED: f"this route takes {(error.headers or {}).get('Allow', 'another method')}",
    }.get(status, error.detail)
    if error.detail != status.phrase:
        reason = error.detail
    content = {
        "message": f"{request.method} {request.url.path}: {reason}",
        "type": status.phrase.title().replace(" ", "") + "Error",
        "param": None,
        "code": status.value,
    }
    return JSONResponse({"error": content}, status_code=status, headers=error.headers)
