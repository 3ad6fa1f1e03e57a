"""Video files: frames in, an MP4 that browsers and players show out (H.264, yuv420p). Must not import vLLM or torch."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

# The encoder's own choice depends on the machine, and the file on the number of threads.
_THREADS = 4
_OPTIONS = {"crf": "18", "preset": "medium"}  # visually lossless
SMALLEST_RATE, LARGEST_RATE = 0.1, 1000  # frames a second
SPRITES_A_ROW, SPRITE_WIDTH = 5, 160
LARGEST_SIDE = 16383  # of what H.264 and WebP can hold


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write an MP4 file; what was there is replaced.

    Args:
        frames: uint8 [number, height, width, 3], RGB; height and width are even.
        fps: frames a second.

    Raises:
        ValueError: the frames or `fps` are not as above.
        OSError: the file can't be written.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 [number, height, width, 3], not {frames.dtype} {list(frames.shape)}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"frames must have an even height and width, not {frames.shape[1]} and {frames.shape[2]}")
    if not SMALLEST_RATE <= fps <= LARGEST_RATE:
        raise ValueError(f"fps={fps} is not valid: it must be a number from {SMALLEST_RATE} to {LARGEST_RATE}")
    rate = Fraction(fps).limit_denominator(1001)
    # The index of an MP4 comes last unless it is moved; a browser plays from the first bytes on only if it was.
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate, options=_OPTIONS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.thread_count = _THREADS
        # Without these a player guesses the matrix by the size of the picture, and colours shift.
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def sprite_sheet(frames: np.ndarray) -> Image.Image:
    """Small frames of the whole video in rows, from its first to its last.

    Args:
        frames: uint8 [number, height, width, 3].
    """
    count = min(len(frames), SPRITES_A_ROW**2)
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    height, width = frames.shape[1:3]
    small = SPRITE_WIDTH, max(1, round(SPRITE_WIDTH * height / width))
    columns = min(count, SPRITES_A_ROW)
    sheet = Image.new("RGB", (columns * small[0], -(-count // columns) * small[1]))
    for place, index in enumerate(chosen):
        row, column = divmod(place, columns)
        sheet.paste(Image.fromarray(frames[index]).resize(small), (column * small[0], row * small[1]))
    return sheet
