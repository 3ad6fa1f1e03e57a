"""Video files, decoded again: frames, size, rate, colours, and what is refused."""

from fractions import Fraction

import av
import numpy as np
import pytest

from vllm_cfg_plugin.entrypoints.videos.file import write_video

COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (250, 250, 250), (5, 5, 5), (128, 60, 190))


def plain_frames(colours=COLOURS, height=64, width=96) -> np.ndarray:
    return np.stack([np.full((height, width, 3), colour, np.uint8) for colour in colours])


def decode(path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as container:
        (stream,) = container.streams
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream


def test_frames_come_back(tmp_path):
    frames = plain_frames()
    write_video(tmp_path / "video.mp4", frames, 16)
    decoded, _ = decode(tmp_path / "video.mp4")
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).max() <= 4


def test_players_know_what_it_is(tmp_path):
    write_video(tmp_path / "video.mp4", plain_frames(), 16)
    with av.open(str(tmp_path / "video.mp4")) as container:
        (stream,) = container.streams
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (16, len(COLOURS))
        assert stream.duration * stream.time_base == Fraction(len(COLOURS), 16)
        assert codec.colorspace == 1  # BT.709
    data = (tmp_path / "video.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("fps", "rate"), [(24, 24), (29.97, Fraction(2997, 100)), (12.5, Fraction(25, 2)), (1, 1)])
def test_rates(tmp_path, fps, rate):
    write_video(tmp_path / "video.mp4", plain_frames(), fps)
    decoded, stream = decode(tmp_path / "video.mp4")
    assert len(decoded) == len(COLOURS)
    assert stream.average_rate == rate


def test_one_frame_is_a_video(tmp_path):
    write_video(tmp_path / "video.mp4", plain_frames(COLOURS[:1]), 16)
    assert len(decode(tmp_path / "video.mp4")[0]) == 1


def test_the_same_frames_are_the_same_bytes(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, 16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("frames", "fps", "what"),
    [
        (plain_frames().astype(np.float32), 16, "uint8"),
        (plain_frames()[0], 16, "number, height"),
        (plain_frames()[:0], 16, "number, height"),
        (plain_frames()[..., :1], 16, "number, height"),
        (plain_frames(height=63), 16, "even"),
        (plain_frames(), 0, "fps"),
        (plain_frames(), float("nan"), "fps"),
        (plain_frames(), 1e9, "fps"),
        (plain_frames(), 1e-9, "fps"),
    ],
)
def test_what_can_not_be_written_is_refused(tmp_path, frames, fps, what):
    with pytest.raises(ValueError, match=what):
        write_video(tmp_path / "video.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        write_video(tmp_path / "missing" / "video.mp4", plain_frames(), 16)
