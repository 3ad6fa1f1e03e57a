"""What offline generation returns: images or videos, how they came about, and their files. Must not import vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.entrypoints.videos.file import write_video
from vllm_cfg_plugin.errors import InvalidRequestError

_VIDEO_SUFFIX = ".mp4"
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_OPAQUE_SUFFIXES = (".jpg", ".jpeg")


@dataclass
class DiffusionOutput:
    """What became of one prompt.

    Attributes:
        request_id: as it appears in the engine's log.
        prompt: the text.
        images: the finished images, in seed order; all `n` of them unless `error` says otherwise. A layered image is
            its layers, one after the other. Empty for a model of videos.
        videos: the finished videos, in seed order; each the list of its frames. Empty for a model of images.
        fps: frames a second at which the videos are meant to be shown.
        error: why results are missing, or None.
        image_metrics: one per image or video that was asked for.
    """

    request_id: str
    prompt: str
    images: list[Image.Image] = field(default_factory=list)
    videos: list[list[Image.Image]] = field(default_factory=list)
    fps: float = 0
    error: str | None = None
    image_metrics: list[RequestMetrics] = field(default_factory=list)

    @property
    def frames(self) -> list[Image.Image]:
        """Of the first video; empty without one."""
        return self.videos[0] if self.videos else []

    @property
    def metrics(self) -> RequestMetrics:
        """Of the whole prompt: each time is its slowest result's, the rest is its first result's."""
        times = ("queue_ms", "encode_ms", "denoise_ms", "decode_ms", "e2e_time_ms")
        longest = {name: max(getattr(metrics, name) for metrics in self.image_metrics) for name in times}
        return msgspec.structs.replace(self.image_metrics[0], **longest)

    def save(self, path: str | Path, fps: float | None = None) -> list[Path]:
        """Write the first video, or all images; returns the files.

        Args:
            path: of the file, .mp4 of a video and .png, .jpg, .jpeg or .webp of an image. Several images become
                several files, `cat.png` then is `cat_0.png`, `cat_1.png`, ...
            fps: frames a second of the video; None for `self.fps`.

        Raises:
            ValueError: there is nothing to save, or not in a file of that name.
            OSError: a file can't be written.
        """
        path = Path(path)
        if self.frames:
            self._check_suffix(path, (_VIDEO_SUFFIX,))
            write_video(path, np.stack([np.asarray(frame) for frame in self.frames]), self.fps if fps is None else fps)
            return [path]
        if not self.images:
            raise ValueError(f"request {self.request_id} has nothing to save: {self.error}")
        if fps is not None:
            raise InvalidRequestError("fps", fps, "absent: these are images, not a video")
        is_opaque = all(image.mode == "RGB" for image in self.images)
        self._check_suffix(path, [name for name in _IMAGE_SUFFIXES if is_opaque or name not in _OPAQUE_SUFFIXES])
        paths = [path]
        if len(self.images) > 1:
            paths = [path.with_stem(f"{path.stem}_{index}") for index in range(len(self.images))]
        for image, file in zip(self.images, paths, strict=True):
            image.save(file)
        return paths

    def _check_suffix(self, path: Path, allowed: Sequence[str]) -> None:
        if path.suffix.lower() not in allowed:
            what = "a video" if self.frames else "images"
            raise InvalidRequestError("path", str(path), f"a name that ends in {' or '.join(allowed)}: this is {what}")
