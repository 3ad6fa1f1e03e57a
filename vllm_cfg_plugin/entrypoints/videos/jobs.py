"""The video jobs of one API server: their states in memory, their files in a temporary directory that goes at exit.

Several API servers do not share them: a job is known only to the server that created it, so clients of
`--api-server-count` above 1 need a load balancer that keeps them on one server. Must not import vLLM or torch.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from vllm_cfg_plugin.entrypoints.videos.schema import Video, VideoError, VideoList
from vllm_cfg_plugin.errors import InvalidRequestError, VideoNotFoundError

MAX_FINISHED = 1000
MAX_BYTES = 4 * 2**30
KEEP_SECONDS = 3600


@dataclass(eq=False)
class VideoJob:
    """One job: what users see of it, and its files.

    Attributes:
        file: the MP4 file, there once the job is completed; thumbnail: WebP; spritesheet: JPEG.
        stored_bytes: of both.
        is_removed: nobody can ask for it any more; who still writes its files removes them.
        cancel: stops it while it runs.
    """

    video: Video
    file: Path
    thumbnail: Path
    spritesheet: Path
    stored_bytes: int = 0
    is_removed: bool = False
    cancel: Callable[[], Any] = lambda: None

    @property
    def is_finished(self) -> bool:
        return self.video.status in ("completed", "failed")

    @property
    def files(self) -> tuple[Path, ...]:
        return self.file, self.thumbnail, self.spritesheet

    def remove_files(self) -> None:
        for file in self.files:
            file.unlink(missing_ok=True)


class VideoJobs:
    """Jobs by id, in the order in which they came. Finished ones go when they expire or are too many, oldest first.

    Args:
        max_finished, max_bytes: finished jobs that are kept, and bytes of their files; the last one is kept always.
        keep_seconds: from a job's end until it expires.
        now: the clock, seconds since 1970.
    """

    def __init__(
        self,
        max_finished: int = MAX_FINISHED,
        max_bytes: int = MAX_BYTES,
        keep_seconds: int = KEEP_SECONDS,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._max_finished = max_finished
        self._max_bytes = max_bytes
        self._keep_seconds = keep_seconds
        self._now = now
        self._jobs: dict[str, VideoJob] = {}

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="vllm-cfg-videos-")

    def add(self, video: Video) -> VideoJob:
        folder = Path(self._folder.name)
        file, thumbnail, spritesheet = (folder / f"{video.id}.{kind}" for kind in ("mp4", "webp", "jpg"))
        job = VideoJob(video, file, thumbnail, spritesheet)
        self._jobs[video.id] = job
        return job

    def get(self, video_id: str) -> VideoJob:
        """A job.

        Raises:
            VideoNotFoundError: there is none of this id, or none any more.
        """
        self._forget_expired()
        if video_id not in self._jobs:
            raise VideoNotFoundError(
                f"video {video_id!r} does not exist here: it was deleted, has expired, or never was"
            )
        return self._jobs[video_id]

    def page(self, after: str | None, limit: int, order: Literal["asc", "desc"]) -> VideoList:
        """At most `limit` videos from the one after `after` on, oldest first ("asc") or newest first.

        Raises:
            InvalidRequestError: `after` is not the id of a video.
        """
        self._forget_expired()
        videos = [job.video for job in self._jobs.values()]
        if order == "desc":
            videos.reverse()
        if after is not None:
            if after not in self._jobs:
                raise InvalidRequestError("after", after, "the id of a video of this server")
            videos = list(itertools.dropwhile(lambda video: video.id != after, videos))[1:]
        return VideoList.of(videos[:limit], len(videos) > limit)

    def note_progress(self, video_id: str, done: int, steps: int) -> None:
        """Denoising steps that a job has done; a job that is not there was just deleted."""
        job = self._jobs.get(video_id)
        if job is not None and not job.is_finished:
            job.video.status = "in_progress"
            job.video.progress = max(job.video.progress, min(100 * done // steps, 99))

    def complete(self, job: VideoJob, metrics: dict[str, Any]) -> None:
        """Its files are there."""
        job.stored_bytes = sum(file.stat().st_size for file in job.files)
        job.video.status, job.video.progress, job.video.metrics = "completed", 100, metrics
        self._end(job)

    def fail(self, job: VideoJob, code: str, message: str) -> None:
        job.remove_files()
        job.video.status, job.video.error = "failed", VideoError(code=code, message=message)
        self._end(job)

    def remove(self, video_id: str) -> None:
        """Forget a job, its files too; one that runs is stopped.

        Raises:
            VideoNotFoundError: as `get`.
        """
        self._drop(self.get(video_id))

    def _drop(self, job: VideoJob) -> None:
        del self._jobs[job.video.id]
        job.is_removed = True
        job.cancel()
        job.remove_files()

    def _end(self, job: VideoJob) -> None:
        job.video.completed_at = int(self._now())
        job.video.expires_at = job.video.completed_at + self._keep_seconds
        finished = sorted(
            (other for other in self._jobs.values() if other.is_finished),
            key=lambda other: other.video.completed_at or 0,
        )
        stored = sum(other.stored_bytes for other in finished)
        while len(finished) > 1 and (len(finished) > self._max_finished or stored > self._max_bytes):
            oldest = finished.pop(0)
            stored -= oldest.stored_bytes
            self._drop(oldest)

    def _forget_expired(self) -> None:
        now = self._now()
        for job in [job for job in self._jobs.values() if (job.video.expires_at or now + 1) <= now]:
            self._drop(job)
