"""Video jobs through a real `vllm serve` of a random-weight Wan, by OpenAI's own client; and videos offline."""

import io
import time

import av
import numpy as np
import pytest
from openai import NotFoundError, OpenAI

from examples.vllm_server import VllmServer
from tests.e2e.conftest import START_TIMEOUT_S
from tests.e2e.server import Footprint
from tests.model_builders.wan import build_wan
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:The Sora API")]
SMALL = {"seed": 3, "num_frames": 9, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return build_wan(tmp_path_factory.mktemp("model") / "wan", "2.1")


def frames_of(file) -> np.ndarray:
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_videos_of_a_server(wan, tmp_path):
    options = ["--cfg-parallel-size", "2", "--served-model-name", "wan"]
    with VllmServer(wan, options, tmp_path / "server.log") as server:
        server.wait_ready(START_TIMEOUT_S)
        with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
            done = client.videos.create_and_poll(prompt="a cat", size="64x32", extra_body=SMALL, poll_interval_ms=50)
            assert done.status == "completed", done.error
            assert (done.size, done.num_frames, done.metrics["steps"]) == ("64x32", 9, 4)
            assert frames_of(io.BytesIO(client.videos.download_content(done.id).content)).shape == (9, 32, 64, 3)

            long = client.videos.create(prompt="a dog", size="64x32", extra_body={**SMALL, "num_inference_steps": 200})
            seen = set()
            while (video := client.videos.retrieve(long.id)).progress < 2:
                assert video.status in ("queued", "in_progress")
                time.sleep(0.01)
            seen.add(video.status)
            assert seen == {"in_progress"}
            client.videos.delete(long.id)
            with pytest.raises(NotFoundError):
                client.videos.retrieve(long.id)
            again = client.videos.create_and_poll(prompt="a cat", size="64x32", extra_body=SMALL, poll_interval_ms=50)
            assert again.status == "completed"
            assert [video.id for video in client.videos.list()] == [again.id, done.id]
            client.videos.create(prompt="a dog", size="64x32", extra_body={**SMALL, "num_inference_steps": 200})
        footprint = Footprint.of(server)
    assert footprint.leftovers() == []


def test_a_video_offline(wan, tmp_path):
    params = DiffusionParams(seed=3, num_frames=9, num_inference_steps=4, height=32, width=64)
    with DiffusionLLM(str(wan), cfg_parallel_size=2) as llm:
        (output,) = llm.generate("a cat", params)
    assert output.error is None
    assert (len(output.frames), output.frames[0].size) == (9, (64, 32))
    assert frames_of(str(*output.save(tmp_path / "cat.mp4"))).shape == (9, 32, 64, 3)
