"""HTTP: OpenAI's video jobs, `/v1/videos`, in vLLM's OpenAI server.

Routes are thin: `schema` knows the fields, `service` does the work, `jobs` keeps the states.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, ValidationError

from vllm_cfg_plugin.entrypoints.error_route import OpenAIErrorRoute
from vllm_cfg_plugin.entrypoints.fields import schema_error
from vllm_cfg_plugin.entrypoints.forms import UploadedFile, files_in, read_form
from vllm_cfg_plugin.entrypoints.service import Files
from vllm_cfg_plugin.entrypoints.videos.schema import DeletedVideo, Video, VideoList, VideosRequest
from vllm_cfg_plugin.entrypoints.videos.service import VideosService
from vllm_cfg_plugin.errors import InvalidRequestError

router = APIRouter(route_class=OpenAIErrorRoute)

# Of a JSON body, counted by its brackets and commas, those in prompts too. An image is one of them; of 256 MB of other
# values Python would make gigabytes of objects.
_MOST_VALUES = 100_000


@dataclass(frozen=True)
class VideoForm:
    """What a request for a video holds: its fields, and the files of its first frame and of its last."""

    body: VideosRequest
    files: Files


async def read_video_form(raw_request: Request) -> VideoForm:
    """A form, as the official clients send it, or JSON.

    Raises:
        InvalidRequestError: it is neither, or one of its fields has the wrong type.
    """
    is_json = "json" in raw_request.headers.get("content-type", "").partition(";")[0].lower()
    fields = await _read_json(raw_request) if is_json else await read_form(raw_request)
    files = files_in(fields.pop(VideosRequest.IMAGES, None), VideosRequest.IMAGES, _reference_file)
    if not is_json:
        return VideoForm(VideosRequest.from_form(fields), files)
    try:
        return VideoForm(VideosRequest.model_validate(fields), files)
    except ValidationError as errors:
        raise schema_error(errors.errors()[0]) from None


async def _read_json(raw_request: Request) -> dict[str, Any]:
    body = await raw_request.body()
    if sum(body.count(mark) for mark in (b"[", b"{", b",")) > _MOST_VALUES:
        raise InvalidRequestError("body", f"{len(body)} bytes of JSON", f"of at most {_MOST_VALUES} values")
    try:
        fields = json.loads(body)
    # Of bytes that are not text too, of numbers too long to parse and of too many brackets in brackets.
    except (ValueError, RecursionError):
        raise InvalidRequestError("body", None, "valid JSON") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("body", fields, "a form, or a JSON object")
    return fields


def _reference_file(reference: object, param: str) -> bytes:
    """An uploaded file, or OpenAI's reference object with a data URL."""
    if isinstance(reference, UploadedFile):
        return reference.data
    url = reference.get("image_url") if isinstance(reference, dict) else None
    if isinstance(url, str) and url.startswith("data:") and ";base64," in url:
        try:
            return base64.b64decode(url.partition(";base64,")[2], validate=True)
        except binascii.Error as error:
            raise InvalidRequestError(param, url, f"base64 that can be decoded: {error}") from None
    allowed = 'an uploaded file, or {"image_url": "data:image/png;base64,..."}: this server fetches nothing'
    raise InvalidRequestError(param, reference, allowed)


def _service(raw_request: Request) -> VideosService:
    service: VideosService = raw_request.app.state.videos_service
    return service


Service = Annotated[VideosService, Depends(_service)]


def _answer(model: BaseModel) -> JSONResponse:
    return JSONResponse(model.model_dump())


@router.post("/v1/videos", responses={HTTPStatus.OK.value: {"model": Video}})
async def create_video(
    form: Annotated[VideoForm, Depends(read_video_form)], raw_request: Request, service: Service
) -> JSONResponse:
    """Start a video; its state is at /v1/videos/{id} and, once completed, its file at /v1/videos/{id}/content."""
    return _answer(await service.create(form.body, raw_request.state.hold, form.files))


@router.get("/v1/videos", responses={HTTPStatus.OK.value: {"model": VideoList}})
async def list_videos(
    service: Service,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> JSONResponse:
    """The videos of this server, newest first."""
    return _answer(service.jobs.page(after, limit, order))


@router.get("/v1/videos/{video_id}", responses={HTTPStatus.OK.value: {"model": Video}})
async def retrieve_video(video_id: str, service: Service) -> JSONResponse:
    """A video's state."""
    return _answer(service.jobs.get(video_id).video)


@router.delete("/v1/videos/{video_id}", responses={HTTPStatus.OK.value: {"model": DeletedVideo}})
async def delete_video(video_id: str, service: Service) -> JSONResponse:
    """Delete a video; one that is not done is cancelled."""
    service.jobs.remove(video_id)
    return _answer(DeletedVideo(id=video_id))


@router.get("/v1/videos/{video_id}/content", response_class=FileResponse)
async def download_video(video_id: str, service: Service, variant: str = "video") -> FileResponse:
    """The MP4 file of a completed video, or with `variant=thumbnail` its first frame as WebP."""
    if variant not in ("video", "thumbnail"):
        raise InvalidRequestError("variant", variant, '"video" or "thumbnail"')
    job = service.finished(video_id)
    if variant == "thumbnail":
        return FileResponse(job.thumbnail, media_type="image/webp")
    return FileResponse(job.file, media_type="video/mp4", filename=job.file.name)
