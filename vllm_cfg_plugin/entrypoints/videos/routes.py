"""HTTP: OpenAI's video jobs, `/v1/videos`, in vLLM's OpenAI server.

Routes are thin: `schema` knows the fields, `service` does the work, `jobs` keeps the states.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel

from vllm_cfg_plugin.entrypoints.error_route import OpenAIErrorRoute
from vllm_cfg_plugin.entrypoints.forms import files_in, read_form
from vllm_cfg_plugin.entrypoints.json_bodies import is_json, read_json, referenced_file
from vllm_cfg_plugin.entrypoints.service import Files
from vllm_cfg_plugin.entrypoints.videos.schema import DeletedVideo, Video, VideoList, VideosRequest
from vllm_cfg_plugin.entrypoints.videos.service import VideosService
from vllm_cfg_plugin.errors import InvalidRequestError

router = APIRouter(route_class=OpenAIErrorRoute)


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
    as_json = is_json(raw_request)
    fields = await read_json(raw_request) if as_json else await read_form(raw_request)
    files = files_in(fields.pop(VideosRequest.IMAGES, None), VideosRequest.IMAGES, referenced_file)
    body = VideosRequest.from_json(fields) if as_json else VideosRequest.from_form(fields)
    return VideoForm(body, files)


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


@router.head("/v1/videos/{video_id}/content", include_in_schema=False)
@router.get("/v1/videos/{video_id}/content", response_class=FileResponse)
async def download_video(video_id: str, service: Service, variant: str = "video") -> FileResponse:
    """The MP4 file of a completed video, its `variant=thumbnail` (WebP) or `spritesheet` (up to 25 frames, JPEG)."""
    job = service.finished(video_id)
    if variant == "video":
        return FileResponse(job.file, media_type="video/mp4", filename=job.file.name)
    if variant == "thumbnail":
        return FileResponse(job.thumbnail, media_type="image/webp")
    if variant == "spritesheet":
        return FileResponse(job.spritesheet, media_type="image/jpeg")
    raise InvalidRequestError("variant", variant, '"video", "thumbnail" or "spritesheet"')
