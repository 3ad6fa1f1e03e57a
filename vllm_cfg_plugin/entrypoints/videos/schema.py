"""The OpenAI videos schemas: what the official clients send to and read from `/v1/videos`.

As in openai-python's `resources/videos.py` and `types/video*.py`; what all generations share is in `fields`. Must not
import vLLM or torch.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, Field

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.entrypoints.fields import DiffusionFields
from vllm_cfg_plugin.entrypoints.videos.file import LARGEST_RATE, LARGEST_SIDE, SMALLEST_RATE
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest

VideoStatus = Literal["queued", "in_progress", "completed", "failed"]


def _as_text(value: object) -> object:
    """OpenAI's field is a text; a number is as good."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class VideosRequest(DiffusionFields):
    """The fields of POST /v1/videos, without `input_reference`.

    `num_frames` decides the length, or `seconds`, as closely as the model can; without both the model does.
    """

    IMAGES: ClassVar[str] = "input_reference"

    seconds: Annotated[str, BeforeValidator(_as_text)] | None = Field(None, description='length of the video, e.g. "4"')
    num_frames: int | None = None
    fps: float | None = Field(
        None, ge=SMALLEST_RATE, le=LARGEST_RATE, description="of the file; the model's own if absent"
    )

    def check(self, info: PipelineInfo) -> None:
        super().check(info)
        if self.num_frames is not None and self.seconds is not None:
            raise InvalidRequestError(
                "seconds", self.seconds, "absent beside num_frames, which says the length exactly"
            )

    def to_params(self, info: PipelineInfo) -> DiffusionParams:
        params = super().to_params(info)
        if self.num_frames is not None:
            return msgspec.structs.replace(params, num_frames=self.num_frames)
        if self.seconds is None:
            return params
        intervals = (self._seconds() * self.rate(info) - 1) / info.frames_per_latent
        return msgspec.structs.replace(params, num_frames=max(round(intervals), 0) * info.frames_per_latent + 1)

    def check_result(self, request: DiffusionRequest) -> None:
        if max(request.height, request.width) > LARGEST_SIDE:
            size = f"{request.width}x{request.height}"
            raise InvalidRequestError("size", size, f"of sides of at most {LARGEST_SIDE} pixels, to fit in a file")

    def rate(self, info: PipelineInfo) -> float:
        """Frames a second of the file."""
        return info.fps if self.fps is None else self.fps

    def length(self, num_frames: int, info: PipelineInfo) -> str:
        """Seconds, as a response shows them."""
        if self.seconds is not None and self.num_frames is None:
            return f"{self._seconds():g}"
        return f"{num_frames / self.rate(info):.4g}"

    def _seconds(self) -> float:
        try:
            seconds = float(self.seconds or 0)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds * LARGEST_RATE < math.inf:
            raise InvalidRequestError("seconds", self.seconds, 'a number of seconds above 0, e.g. "4"')
        return seconds

    def in_request_terms(self, error: InvalidRequestError) -> InvalidRequestError:
        if error.param == "num_frames" and self.num_frames is None and self.seconds is not None:
            allowed = f"another length: it stands for num_frames={error.value}, which must be {error.allowed}"
            return InvalidRequestError("seconds", self.seconds, allowed)
        return super().in_request_terms(error)


class VideoError(BaseModel):
    """Why a video failed; `code` is "failed", "aborted" or "cancelled"."""

    code: str
    message: str


class Video(BaseModel):
    """A job and what became of it; from `seed` on the fields are ours.

    Attributes:
        progress: percent; of a running job the share of its denoising steps, 100 only when its file is there.
        expires_at: when the file goes.
        metrics: engine.metrics.RequestMetrics of a completed one.
    """

    id: str
    object: Literal["video"] = "video"
    model: str
    status: VideoStatus = "queued"
    progress: int = 0
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    error: VideoError | None = None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: None = None
    seed: int
    num_frames: int
    fps: float
    metrics: dict[str, Any] | None = None


class VideoList(BaseModel):
    """One page of videos; the next one comes after `last_id`."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, videos: list[Video], has_more: bool) -> VideoList:
        first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
        return cls(data=videos, first_id=first, last_id=last, has_more=has_more)


class DeletedVideo(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True
