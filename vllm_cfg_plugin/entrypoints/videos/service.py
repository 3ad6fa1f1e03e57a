"""Video jobs from their checked bodies to their files: engine calls, states, cancellation. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import msgspec
import numpy as np
from vllm.exceptions import VLLMError
from vllm.logger import init_logger
from vllm.utils import random_uuid
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_cfg_plugin.engine.progress import Progress
from vllm_cfg_plugin.entrypoints.engine_calls import EngineCalls, Work
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd
from vllm_cfg_plugin.entrypoints.images.files import encode_image
from vllm_cfg_plugin.entrypoints.input_budget import InputHold
from vllm_cfg_plugin.entrypoints.service import DiffusionService, Files
from vllm_cfg_plugin.entrypoints.videos.file import sprite_sheet, write_video
from vllm_cfg_plugin.entrypoints.videos.jobs import VideoJob, VideoJobs
from vllm_cfg_plugin.entrypoints.videos.schema import Video, VideosRequest
from vllm_cfg_plugin.errors import CfgPluginError, InvalidRequestError, RequestAbortedError, ServerBusyError
from vllm_cfg_plugin.params import DiffusionRequest

logger = init_logger(f"vllm.{__name__}")

_THUMBNAIL_QUALITY = 80


class VideosService(DiffusionService):
    """Starts videos as jobs; its calls are made on one event loop.

    Attributes:
        jobs: of this server.
    """

    produces = "video"

    def __init__(self, calls: EngineCalls, front_end: FrontEnd, model_names: Sequence[str]) -> None:
        super().__init__(calls, front_end, model_names)
        self.jobs = VideoJobs()

    async def create(self, body: VideosRequest, hold: InputHold, files: Files = None) -> Video:
        """Start a job.

        Args:
            hold: of its input's memory, which it keeps.
            files: images that came with it, the first frame and, for some models, the last.

        Raises:
            InvalidRequestError, ModelNotFoundError: the request is wrong; nothing was started.
            ServerBusyError: there is no room for it now; nothing was started.
        """
        async with self._admitted(body, files, hold) as (request,):
            video = self._describe(body, request)
            work = self._calls.start([request], video.id, partial(self._note, video.id))
        job = self.jobs.add(video)
        task = asyncio.create_task(self._run(job, work))
        ending = ExitStack()  # also where the task is cancelled before it began
        ending.enter_context(hold)
        ending.callback(work.cancel)
        task.add_done_callback(lambda _: ending.close())
        job.cancel = task.cancel
        return video

    def _note(self, video_id: str, _: int, update: object) -> None:
        if isinstance(update, Progress):
            self.jobs.note_progress(video_id, update.done, update.steps)

    def _describe(self, body: VideosRequest, request: DiffusionRequest) -> Video:
        info = self._front_end.info
        return Video(
            id=f"video_{random_uuid()}",
            model=self._model_name(body),
            # Where no updates come, nobody knows when its first step is done.
            status="queued" if self._calls.updates.are_heard else "in_progress",
            created_at=int(time.time()),
            prompt=body.prompt,
            seconds=body.length(request.num_frames, info),
            size=f"{request.width}x{request.height}",
            seed=request.seed,
            num_frames=request.num_frames,
            fps=body.rate(info),
        )

    def finished(self, video_id: str) -> VideoJob:
        """A job whose files are there.

        Raises:
            VideoNotFoundError: there is none of this id.
            InvalidRequestError: it is not completed.
        """
        job = self.jobs.get(video_id)
        if job.video.status != "completed":
            state = f"failed: {job.video.error.message}" if job.video.error else f"is {job.video.status}"
            raise InvalidRequestError("video_id", video_id, f"that of a completed video, and this one {state}")
        return job

    async def _run(self, job: VideoJob, work: Work) -> None:
        """To its end, whatever that is: nobody waits for this, so the job's state says it."""
        try:
            (result,) = await self._calls.finish(work, job.video.id)
            await asyncio.to_thread(_write_files, job, result.pixels)
            self.jobs.complete(job, msgspec.structs.asdict(result.metrics))
        except asyncio.CancelledError:
            self.jobs.fail(job, "cancelled", "it was deleted, or the server stopped, before it was done")
            raise
        except (RequestAbortedError, ServerBusyError) as error:
            self.jobs.fail(job, "aborted", str(error))
        except CfgPluginError as error:
            self.jobs.fail(job, "failed", str(error))
        except EngineDeadError:
            self.jobs.fail(job, "aborted", "the engine has died, see the server's log")
        except VLLMError as error:
            logger.exception("Video %s can't be made", job.video.id)
            self.jobs.fail(job, "failed", f"the video can't be made: {error}")
        except Exception as error:
            logger.exception("Video %s can't be written", job.video.id)
            self.jobs.fail(job, "failed", f"the video can't be written: {error}")


def _write_files(job: VideoJob, frames: np.ndarray) -> None:
    """All files; takes long enough to be kept off the event loop.

    Args:
        frames: uint8 [number, height, width, 3].
    """
    write_video(job.file, frames, job.video.fps)
    job.thumbnail.write_bytes(encode_image(frames[0], "webp", _THUMBNAIL_QUALITY))
    sprite_sheet(frames).save(job.spritesheet, quality=_THUMBNAIL_QUALITY)
    if job.is_removed:  # meanwhile
        job.remove_files()
