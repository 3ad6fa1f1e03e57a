"""Video jobs through a real `vllm serve` of a random-weight Wan, by OpenAI's own client; and videos offline."""

import io
import time

import av
import numpy as np
import pytest
from openai import NotFoundError, OpenAI

from examples.vllm_server import VllmServer
from tests.e2e.conftest import START_TIMEOUT_S
from tests.e2e.scripts import flags, run
from tests.e2e.server import Footprint
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:The Sora API")]
SMALL = {"seed": 3, "num_frames": 9, "num_inference_steps": 4}
LONG = {**SMALL, "num_inference_steps": 200}


@pytest.fixture(scope="module")
def server(video_model, tmp_path_factory):
    options = ["--cfg-parallel-size", "2", "--served-model-name", "wan"]
    with VllmServer(video_model, options, tmp_path_factory.mktemp("server") / "server.log") as server:
        server.wait_ready(START_TIMEOUT_S)
        yield server


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def frames_of(file) -> np.ndarray:
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_job_is_followed_to_its_end(client):
    done = client.videos.create_and_poll(prompt="a cat", size="64x32", extra_body=SMALL, poll_interval_ms=50)
    assert done.status == "completed", done.error
    assert (done.size, done.num_frames, done.metrics["steps"]) == ("64x32", 9, 4)
    assert frames_of(io.BytesIO(client.videos.download_content(done.id).content)).shape == (9, 32, 64, 3)


def test_a_job_that_runs_can_be_deleted(client):
    before = [video.id for video in client.videos.list()]
    long = client.videos.create(prompt="a dog", size="64x32", extra_body=LONG)
    while (video := client.videos.retrieve(long.id)).progress < 2:
        assert video.status in ("queued", "in_progress")
        time.sleep(0.01)
    assert video.status == "in_progress"
    client.videos.delete(long.id)
    with pytest.raises(NotFoundError):
        client.videos.retrieve(long.id)
    again = client.videos.create_and_poll(prompt="a cat", size="64x32", extra_body=SMALL, poll_interval_ms=50)
    assert again.status == "completed"
    assert [video.id for video in client.videos.list()] == [again.id, *before]


def test_the_client_finds_the_endpoint_of_videos(server, tmp_path):
    asked = {"url": f"{server.url}/v1", "prompt": "a cat walks", "guidance_scale": 4.0, "num_inference_steps": 4}
    by_hint = flags(**asked, size="32x32", output="hint.mp4")
    by_frames = flags(**asked, num_frames=5, size="48x32", output="frames.mp4")
    assert "saved hint.mp4" in run("openai_client.py", *by_hint, cwd=tmp_path)
    assert "saved frames.mp4" in run("openai_client.py", *by_frames, cwd=tmp_path)
    for name, size in (("hint", (32, 32)), ("frames", (48, 32))):
        with av.open(str(tmp_path / f"{name}.mp4")) as video:
            sizes = [(frame.width, frame.height) for frame in video.decode(video=0)]
        assert len(sizes) >= 5
        assert set(sizes) == {size}


def test_a_server_that_ends_amid_a_job_leaves_nothing_behind(server, client):
    """The last test of the server: it ends it."""
    client.videos.create(prompt="a dog", size="64x32", extra_body=LONG)
    footprint = Footprint.of(server)
    server.stop()
    assert footprint.leftovers() == []


def test_a_video_offline(video_model, tmp_path):
    params = DiffusionParams(seed=3, num_frames=9, num_inference_steps=4, height=32, width=64)
    with DiffusionLLM(str(video_model), cfg_parallel_size=2) as llm:
        (output,) = llm.generate("a cat", params)
    assert output.error is None
    assert (len(output.frames), output.frames[0].size) == (9, (64, 32))
    assert frames_of(str(*output.save(tmp_path / "cat.mp4"))).shape == (9, 32, 64, 3)
