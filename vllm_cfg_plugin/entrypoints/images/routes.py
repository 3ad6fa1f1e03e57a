"""HTTP: `POST /v1/images/generations` and `/v1/images/edits` in vLLM's OpenAI server.

Routes are thin: `schema` knows the fields, `forms` reads uploads, `service` does the work, `error_route` answers with
errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.utils import random_uuid

from vllm_cfg_plugin.entrypoints.error_route import OpenAIErrorRoute, TextRoute, error_body
from vllm_cfg_plugin.entrypoints.forms import files_in, read_form, uploaded_file
from vllm_cfg_plugin.entrypoints.images.schema import (
    EditsRequest,
    ImagesRequest,
    ImagesResponse,
    JsonEditsRequest,
    edits_form_schema,
)
from vllm_cfg_plugin.entrypoints.images.service import ImagesService
from vllm_cfg_plugin.entrypoints.images.stream import ImageStream
from vllm_cfg_plugin.entrypoints.json_bodies import is_json, read_json, referenced_file
from vllm_cfg_plugin.entrypoints.service import Files

router = APIRouter(route_class=OpenAIErrorRoute)
_text_router = APIRouter(route_class=TextRoute)
plain_router = APIRouter()


@_text_router.post("/v1/images/generations", responses={HTTPStatus.OK.value: {"model": ImagesResponse}})
@with_cancellation
@load_aware_call
async def generate_images(body: ImagesRequest, raw_request: Request) -> Response:
    """Text to image: the fields of OpenAI's images API, and those of diffusion (`ImagesRequest`)."""
    return await _respond(raw_request, body)


router.include_router(_text_router)


@dataclass(frozen=True)
class EditForm:
    """What a body for /v1/images/edits holds: its fields, and its images as `read_images` takes them."""

    body: EditsRequest
    files: Files


async def read_edit_form(raw_request: Request) -> EditForm:
    """Reads the whole body, so that `with_cancellation` may wait for a disconnect.

    Raises:
        InvalidRequestError: it is neither form nor JSON, or one of its fields has the wrong type.
    """
    if is_json(raw_request):
        return _from_json(await read_json(raw_request))
    fields = await read_form(raw_request)
    files = files_in(fields.pop(EditsRequest.IMAGES, None), EditsRequest.IMAGES, uploaded_file)
    mask = files_in(fields.get("mask"), "mask", uploaded_file)
    return EditForm(EditsRequest.from_form(fields), _with_mask(files, mask))


def _from_json(fields: dict[str, Any]) -> EditForm:
    """`images`, a list of references, as the official clients' types have it; or `image`, as some write it."""
    kind = JsonEditsRequest if JsonEditsRequest.IMAGES in fields else EditsRequest
    files = files_in(fields.pop(kind.IMAGES, None), kind.IMAGES, referenced_file)
    mask = files_in(fields.get("mask"), "mask", referenced_file)
    return EditForm(kind.from_json(fields), _with_mask(files, mask))


def _with_mask(files: Files, mask: Files) -> Files:
    """The images and, behind them, what says where the first one is to be changed."""
    return files if mask is None else [*_listed(files), *_listed(mask)]


def _listed(files: Files) -> list[bytes]:
    if files is None:
        return []
    return files if isinstance(files, list) else [files]


@router.post(
    "/v1/images/edits", responses={HTTPStatus.OK.value: {"model": ImagesResponse}}, openapi_extra=edits_form_schema()
)
@with_cancellation
@load_aware_call
async def edit_images(form: Annotated[EditForm, Depends(read_edit_form)], raw_request: Request) -> Response:
    """Images and text to image: `image` once or `image[]` several times, and the fields of /v1/images/generations.

    As JSON: `images`, a list of `{"image_url": "data:image/png;base64,..."}`.
    """
    return await _respond(raw_request, form.body, form.files)


async def _respond(raw_request: Request, body: ImagesRequest, files: Files = None) -> Response:
    request_id = f"img-{raw_request.headers.get('X-Request-Id') or random_uuid()}"
    service: ImagesService = raw_request.app.state.images_service
    hold = raw_request.state.hold
    if body.stream:
        return EventResponse(await service.stream(body, request_id, hold, files, error_body))
    links_at = str(raw_request.url_for("download_image", name=""))
    response = await service.generate(body, request_id, hold, files, links_at)
    return JSONResponse(response.model_dump(exclude_none=True))


@plain_router.head("/images/{name:path}", include_in_schema=False)
@plain_router.get("/images/{name:path}", response_class=FileResponse)
async def download_image(name: str, raw_request: Request) -> Response:
    """An image whose request had `response_format="url"`; not below /v1, as browsers that follow a link have no key."""
    service: ImagesService = raw_request.app.state.images_service
    path = service.links.find(name)
    if path is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "this link is that of no image, or has expired")
    return FileResponse(path, headers={"Cache-Control": "private, immutable"})


class EventResponse(StreamingResponse):
    """A stream that is closed however it ends: a client that leaves cancels its request."""

    def __init__(self, stream: ImageStream) -> None:
        # The header is nginx's name for "hand on each event as it comes".
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(stream.events(), media_type="text/event-stream", headers=headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()
