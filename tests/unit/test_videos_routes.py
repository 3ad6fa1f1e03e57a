"""The videos routes in front of a fake engine, as OpenAI's own client calls them. No processes, no weights."""

import asyncio
import base64
import io
import json
from dataclasses import replace

import av
import httpx
import msgspec
import numpy as np
import pytest
from openai import AsyncOpenAI, NotFoundError
from PIL import Image
from vllm.exceptions import QueueOverflowError
from vllm.v1.engine.exceptions import EngineDeadError

from tests.unit.fakes import IMAGE_TO_VIDEO_INFO, INFO, LIMITS, VIDEO_INFO, answer
from tests.unit.http_app import FakeEngine, make_app
from vllm_cfg_plugin.config import new_address
from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.engine.progress import Progress, ProgressPublisher, address_of_client
from vllm_cfg_plugin.engine.result import ResultHeader, pack_result
from vllm_cfg_plugin.entrypoints.videos import service as video_serving
from vllm_cfg_plugin.entrypoints.videos.jobs import VideoJobs
from vllm_cfg_plugin.entrypoints.videos.schema import Video
from vllm_cfg_plugin.errors import InvalidRequestError, VideoNotFoundError

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")  # openai-python's word on its own servers
VIDEOS = "/v1/videos"
GOOD = {"prompt": "a cat", "seed": 5}


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def app(engine, monkeypatch):
    return make_app(engine, monkeypatch, VIDEO_INFO)


@pytest.fixture
def image_to_video_app(engine, monkeypatch):
    return make_app(engine, monkeypatch, IMAGE_TO_VIDEO_INFO)


def with_client(app, use):
    """What `use(client, http)` returns, for OpenAI's client and a bare one; all on one event loop, as jobs need it."""

    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://test") as http,
            AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http) as client,
        ):
            return await use(client, http)

    return asyncio.run(run())


def post(app, body=None, **request):
    return with_client(app, lambda client, http: http.post(VIDEOS, **({"json": body} if body is not None else request)))


async def poll(client, video_id):
    for _ in range(500):
        video = await client.videos.retrieve(video_id)
        if video.status in ("completed", "failed"):
            return video
        await asyncio.sleep(0.01)
    raise TimeoutError(video.status)


def png(colour=(200, 30, 30), size=(64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def decode(data: bytes) -> tuple[np.ndarray, float]:
    with av.open(io.BytesIO(data)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        return frames, float(container.streams.video[0].average_rate)


def hang(engine):
    """Requests never end; returns an event that says that one has begun."""
    started = asyncio.Event()

    async def behave(request):
        started.set()
        await asyncio.sleep(60)

    engine.behave = behave
    return started


def test_a_video_from_the_first_call_to_its_file(app, engine):
    async def use(client, http):
        video = await client.videos.create(
            model="emoji",
            prompt="a cat",
            size="96x64",
            seconds="1",
            extra_body={
                "seed": 3,
                "negative_prompt": "null",
                "num_inference_steps": 4,
                "guidance_scale": 4.5,
                "guidance_scale_2": 3.0,
                "guidance_interval": [0.0, 0.5],
                "cfg_normalize": True,
                "guidance_rescale": 0.25,
                "combine_rule": "cfg_zero_star",
                "cache": "static",
                "cache_order": 2,
                "fps": 8,
            },
        )
        assert (video.object, video.status, video.progress, video.error) == ("video", "in_progress", 0, None)
        done = await poll(client, video.id)
        content = await client.videos.download_content(video.id)
        thumbnail = await client.videos.download_content(video.id, variant="thumbnail")
        sheet = await client.videos.download_content(video.id, variant="spritesheet")
        return video, done, content, thumbnail, sheet

    video, done, content, thumbnail, sheet = with_client(app, use)
    assert (done.id, done.status, done.progress) == (video.id, "completed", 100)
    assert (done.size, done.seconds, done.model, done.prompt) == ("96x64", "1", "emoji", "a cat")
    assert (done.seed, done.num_frames, done.fps) == (3, 9, 8)
    assert done.created_at <= done.completed_at < done.expires_at
    assert done.metrics["steps"] == 4
    (request,) = engine.requests.values()
    assert (request.prompts, request.num_frames, request.progress_key) == (["a cat", "null"], 9, "")
    guidance = request.guidance
    assert (guidance.scale, guidance.scale_2, guidance.interval) == (4.5, 3.0, (0.0, 0.5))
    assert (guidance.normalize, guidance.rescale, guidance.rule) == (True, 0.25, "cfg_zero_star")
    assert request.cache.order == 2
    frames, rate = decode(content.content)
    assert (frames.shape, rate) == ((9, 64, 96, 3), 8)
    assert content.response.headers["content-type"] == "video/mp4"
    opened = Image.open(io.BytesIO(thumbnail.content))
    assert (opened.format, opened.size) == ("WEBP", (96, 64))
    opened = Image.open(io.BytesIO(sheet.content))
    assert (opened.format, opened.size) == ("JPEG", (5 * 160, 2 * 107))


def test_create_and_poll(app):
    done = with_client(
        app, lambda client, http: client.videos.create_and_poll(prompt="a cat", model="alias", poll_interval_ms=10)
    )
    assert (done.status, done.model, done.seconds, done.num_frames) == ("completed", "alias", "0.5625", 9)


def test_a_players_range_request(app):
    async def use(client, http):
        video = await client.videos.create_and_poll(prompt="a cat", poll_interval_ms=10)
        whole = await http.get(f"{VIDEOS}/{video.id}/content")
        part = await http.get(f"{VIDEOS}/{video.id}/content", headers={"Range": "bytes=10-19"})
        return whole, part, await http.head(f"{VIDEOS}/{video.id}/content")

    whole, part, head = with_client(app, use)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(whole.content)
    assert part.status_code == 206
    assert part.content == whole.content[10:20]


@pytest.mark.parametrize(
    ("sent", "frames", "seconds"),
    [
        ({}, 9, "0.5625"),
        ({"seconds": "4"}, 65, "4"),
        ({"seconds": 4}, 65, "4"),
        ({"seconds": "1", "fps": 24}, 25, "1"),
        ({"seconds": "0.01"}, 1, "0.01"),
        ({"num_frames": 5}, 5, "0.3125"),
        ({"seconds": None, "num_frames": None, "fps": None}, 9, "0.5625"),
    ],
)
def test_number_of_frames(app, engine, sent, frames, seconds):
    body = post(app, {**GOOD, **sent}).json()
    assert (body["num_frames"], body["seconds"]) == (frames, seconds)
    form = {name: (None, str(value)) for name, value in {**GOOD, **sent}.items() if value is not None}
    body = post(app, files=form).json()
    assert (body["num_frames"], body["seconds"]) == (frames, seconds)


def test_an_image_to_start_from(image_to_video_app, engine):
    video = with_client(
        image_to_video_app,
        lambda client, http: client.videos.create_and_poll(prompt="a cat", input_reference=png(), poll_interval_ms=10),
    )
    assert video.status == "completed", video.error
    (request,) = engine.requests.values()
    (image,) = request.images
    assert (image.mode, image.width, image.height) == ("RGB", 64, 64)
    assert image.pixels[:3] == bytes((200, 30, 30))


def test_an_image_in_a_data_url(image_to_video_app, engine):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    for request in (
        {"json": {**GOOD, "input_reference": {"image_url": url}}},
        {"files": {"prompt": (None, "a cat"), "input_reference[image_url]": (None, url)}},
    ):
        response = post(image_to_video_app, **request)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": "x" * 21}, "prompt", "20 tokens"),
        ({"size": "64"}, "size", "WIDTHxHEIGHT"),
        ({"size": "65x64"}, "size", "multiple of 8"),
        ({"size": "512x512"}, "size", "pixels"),
        ({"num_frames": 8}, "num_frames", "5 or 9"),
        ({"num_frames": 0}, "num_frames", "1 or 5"),
        ({"num_frames": "many"}, "num_frames", "integer"),
        ({"num_frames": 4_000_001}, "num_frames", "--max-video-pixels"),
        ({"seconds": "1000000"}, "seconds", "--max-video-pixels"),
        ({"seconds": "four"}, "seconds", "seconds above 0"),
        ({"seconds": "0"}, "seconds", "seconds above 0"),
        ({"seconds": "-4"}, "seconds", "seconds above 0"),
        ({"seconds": "nan"}, "seconds", "seconds above 0"),
        ({"seconds": "1e400"}, "seconds", "seconds above 0"),
        ({"seconds": 10**400}, "seconds", "seconds above 0"),
        ({"seconds": "4", "num_frames": 5}, "seconds", "beside num_frames"),
        ({"seconds": True}, "seconds", "string"),
        ({"seconds": [4]}, "seconds", "string"),
        ({"seconds": "1e308"}, "seconds", "seconds above 0"),  # more frames than a float can count
        ({"guidance_scale": 1e300}, "guidance_scale", "1000"),
        ({"fps": 0}, "fps", "0.1"),
        ({"fps": 1e-9}, "fps", "0.1"),
        ({"fps": 1e9}, "fps", "1000"),
        ({"num_inference_steps": 51}, "num_inference_steps", "50"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale", "guidance_scale"),
        ({"combine_rule": "magic"}, "combine_rule", "cfg_zero_star"),
        ({"guidance_scal": 4.0}, "guidance_scal", "did you mean guidance_scale?"),
        ({"n": 2}, "n", "no field"),
        ({"stream": True}, "stream", "no field"),
        ({"input_reference": {"file_id": "file-1"}}, "input_reference", "uploaded"),
        ({"input_reference": {"image_url": "http://x/y.png"}}, "input_reference", "fetches"),
        ({"input_reference": {"image_url": "data:image/png;base64,!"}}, "input_reference", "base64"),
        ({"input_reference": {"image_url": "data:image/png;base64,aGk="}}, "input_reference", "text-to-video"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(app, engine, change, param, says):
    response = post(app, {**GOOD, **change})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, 400)
    assert param in error["message"]
    assert says in error["message"]
    assert engine.requests == {}
    if all(isinstance(value, (str, int, float)) for value in change.values()):
        form = {name: (None, str(value)) for name, value in {**GOOD, **change}.items()}
        response = post(app, files=form)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("reference", "says"), [(None, "image-to-video"), (b"not an image", "can be decoded"), (b"", "can be decoded")]
)
def test_image_to_video_needs_an_image(image_to_video_app, engine, reference, says):
    form = {"prompt": (None, "a cat")}
    if reference is not None:
        form["input_reference"] = ("cat.png", reference)
    response = post(image_to_video_app, files=form)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input_reference"
    assert says in response.json()["error"]["message"]
    assert engine.requests == {}


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"", b"1" * 5000, b"[" * 100_000])
def test_a_body_that_is_no_object_is_a_400(app, content):
    response = post(app, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "body")


def test_a_side_that_no_file_can_hold(engine, monkeypatch):
    limits = msgspec.structs.replace(LIMITS, max_image_pixels=16_384 * 8)
    response = post(make_app(engine, monkeypatch, VIDEO_INFO, limits), {**GOOD, "size": "16384x8", "num_frames": 1})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "size")
    assert engine.requests == {}


def test_an_image_model_makes_no_videos(engine, monkeypatch):
    response = post(make_app(engine, monkeypatch, INFO), GOOD)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
    assert "/v1/images/generations" in response.json()["error"]["message"]


def test_a_wrong_model_is_a_404(app):
    response = post(app, {**GOOD, "model": "sora-2"})
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_video_is_a_404(app, method):
    response = with_client(app, lambda client, http: http.request(method, f"{VIDEOS}/video_1"))
    assert (response.status_code, response.json()["error"]["param"]) == (404, "video_id")


@pytest.mark.parametrize("path", ["video_1/content", "video_1/remix", "video_1/content/more"])
def test_paths_that_lead_nowhere(app, path):
    method = "GET" if "content" in path else "POST"
    assert with_client(app, lambda client, http: http.request(method, f"{VIDEOS}/{path}")).status_code == 404


def test_content_of_a_running_video_and_other_variants_are_a_400(app, engine):
    started = hang(engine)

    async def use(client, http):
        video = await client.videos.create(prompt="a cat")
        await started.wait()
        early = await http.get(f"{VIDEOS}/{video.id}/content")
        engine.behave = None
        done = await client.videos.create_and_poll(prompt="a dog", poll_interval_ms=10)
        return early, await http.get(f"{VIDEOS}/{done.id}/content?variant=poster")

    early, sheet = with_client(app, use)
    assert (early.status_code, early.json()["error"]["param"]) == (400, "video_id")
    assert "in_progress" in early.json()["error"]["message"]
    assert (sheet.status_code, sheet.json()["error"]["param"]) == (400, "variant")


def test_pages(app):
    async def use(client, http):
        made = [(await client.videos.create(prompt=str(i))).id for i in range(5)]
        newest = [video.id async for video in client.videos.list(limit=2)]
        oldest = [video.id async for video in client.videos.list(limit=2, order="asc")]
        page = (await http.get(f"{VIDEOS}?limit=2&order=asc&after={made[1]}")).json()
        wrong = [await http.get(f"{VIDEOS}?{query}") for query in ("limit=0", "limit=x", "order=up", "after=x")]
        return made, newest, oldest, page, wrong

    made, newest, oldest, page, wrong = with_client(app, use)
    assert newest == made[::-1]
    assert oldest == made
    assert (page["first_id"], page["last_id"], page["has_more"]) == (made[2], made[3], True)
    assert [response.status_code for response in wrong] == [400] * 4
    assert [response.json()["error"]["param"] for response in wrong] == ["limit", "limit", "order", "after"]


def test_deleting_a_running_video_aborts_its_request(app, engine):
    started = hang(engine)

    async def use(client, http):
        video = await client.videos.create(prompt="a cat")
        await started.wait()
        deleted = await client.videos.delete(video.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
        for _ in range(20):
            await asyncio.sleep(0)
        assert engine.cancelled == [f"{video.id}-0"]
        with pytest.raises(NotFoundError):
            await client.videos.retrieve(video.id)
        engine.behave = None
        assert (await client.videos.create_and_poll(prompt="a dog", poll_interval_ms=10)).status == "completed"

    with_client(app, use)


def test_deleting_a_finished_video_removes_its_files(app):
    async def use(client, http):
        video = await client.videos.create_and_poll(prompt="a cat", poll_interval_ms=10)
        job = app.state.videos_service.jobs.get(video.id)
        assert job.file.exists()
        assert job.thumbnail.exists()
        await client.videos.delete(video.id)
        assert not list(job.file.parent.iterdir())

    with_client(app, use)


def test_files_of_a_video_deleted_meanwhile_go_too(app, monkeypatch):
    """Files written for a video that was deleted meanwhile go too."""
    wrote = []

    def write_and_be_deleted(path, frames, fps):
        path.write_bytes(b"late")
        service = app.state.videos_service
        (video,) = service.jobs.page(None, 10, "asc").data
        job = service.jobs.get(video.id)
        job.is_removed = True  # as `remove` does on the event loop
        wrote.append(job)

    monkeypatch.setattr(video_serving, "write_video", write_and_be_deleted)

    async def use(client, http):
        await client.videos.create(prompt="a cat")
        while not wrote or wrote[0].file.exists():
            await asyncio.sleep(0.01)

    with_client(app, use)


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (RuntimeError("boom"), "failed", "boom"),
        (EngineDeadError(), "aborted", "engine has died"),
        (pack_result(ResultHeader(metrics=RequestMetrics(), error="out of memory")), "failed", "out of memory"),
    ],
)
def test_a_failed_video_says_why(app, engine, failure, code, says):
    async def behave(request):
        if isinstance(failure, Exception):
            raise failure
        return failure

    engine.behave = behave

    async def use(client, http):
        video = await client.videos.create_and_poll(prompt="a cat", poll_interval_ms=10)
        return video, await http.get(f"{VIDEOS}/{video.id}/content")

    video, content = with_client(app, use)
    assert (video.status, video.error.code) == ("failed", code)
    assert says in video.error.message
    assert content.status_code == 400
    assert says in content.json()["error"]["message"]


def test_a_stopping_server_aborts_its_videos(app, engine):
    started = hang(engine)

    async def use(client, http):
        video = await client.videos.create(prompt="a cat")
        await started.wait()
        app.state.server.should_exit = True
        return await poll(client, video.id)

    video = with_client(app, use)
    assert (video.status, video.error.code) == ("failed", "aborted")
    assert "shutting down" in video.error.message
    assert len(engine.cancelled) == 1


def test_progress_of_the_engine(engine, monkeypatch):
    address = new_address("progress")
    app = make_app(engine, monkeypatch, VIDEO_INFO)
    go_on = asyncio.Event()
    publisher = ProgressPublisher(address)

    async def behave(request):
        for _ in range(100):
            publisher.publish(0, Progress(request.progress_key, 5, request.num_inference_steps))
            await asyncio.sleep(0.02)
            if go_on.is_set():
                break
        return answer(request)

    async def use(client, http):
        app.state.engine_calls.updates.listen(address_of_client(address, 0))
        engine.behave = behave
        video = await client.videos.create(prompt="a cat")
        assert video.status == "queued"
        while video.status == "queued":
            video = await client.videos.retrieve(video.id)
            await asyncio.sleep(0.01)
        assert (video.status, video.progress) == ("in_progress", 25)
        go_on.set()
        assert (await poll(client, video.id)).progress == 100

    try:
        with_client(app, use)
    finally:
        publisher.close()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def new_job(jobs: VideoJobs, name: str):
    return jobs.add(
        Video(id=name, model="m", created_at=0, prompt="p", seconds="1", size="64x64", seed=0, num_frames=1, fps=16)
    )


def finished_job(jobs: VideoJobs, name: str, size: int = 10):
    job = new_job(jobs, name)
    job.file.write_bytes(b"x" * size)
    job.thumbnail.write_bytes(b"")
    job.spritesheet.write_bytes(b"")
    jobs.complete(job, {})
    return job


def ids(jobs: VideoJobs) -> list[str]:
    return [video.id for video in jobs.page(None, 100, "asc").data]


def test_finished_jobs_expire():
    clock = Clock()
    jobs = VideoJobs(keep_seconds=60, now=clock)
    job = finished_job(jobs, "a")
    assert job.video.expires_at == 1060
    clock.now = 1059.0
    assert jobs.get("a") is job
    clock.now = 1060.0
    with pytest.raises(VideoNotFoundError):
        jobs.get("a")
    assert not job.file.exists()


def test_the_oldest_finished_jobs_go_when_there_is_no_room():
    """The oldest finished jobs go when there are too many or too large."""
    clock = Clock()
    few, small = VideoJobs(max_finished=2, now=clock), VideoJobs(max_bytes=25, now=clock)
    running = new_job(few, "running")
    made = []
    for name in ("a", "b", "c"):
        clock.now += 1
        made.append(finished_job(few, name))
        finished_job(small, name)
    assert ids(few) == ["running", "b", "c"]
    assert ids(small) == ["b", "c"]
    assert [job.file.exists() for job in made] == [False, True, True]
    clock.now += 1
    finished_job(small, "huge", size=1000)
    assert ids(small) == ["huge"]
    few.note_progress("running", 1, 3)
    few.note_progress("gone", 1, 3)
    assert (running.video.status, running.video.progress) == ("in_progress", 33)
    few.note_progress("c", 1, 3)
    assert made[2].video.progress == 100


def test_files_go_with_the_server():
    jobs = VideoJobs()
    folder = finished_job(jobs, "a").file.parent
    assert folder.exists()
    del jobs
    assert not folder.exists()


def test_a_page_after_an_unknown_video_is_refused():
    with pytest.raises(InvalidRequestError):
        VideoJobs().page("a", 1, "asc")


def test_the_wire_form_is_json(app):
    body = json.loads(post(app, GOOD).text)
    assert {"id", "object", "status", "progress", "created_at", "error", "remixed_from_video_id"} <= set(body)


def test_a_video_that_the_engine_refuses_later_is_no_failed_file(app, engine, caplog):
    """Another API server took the last place."""

    async def behave(request):
        raise QueueOverflowError

    engine.behave = behave
    video = with_client(app, lambda client, http: client.videos.create_and_poll(prompt="a", poll_interval_ms=10))
    assert (video.status, video.error.code) == ("failed", "aborted")
    assert "--max-num-queued-reqs" in video.error.message
    assert "written" not in video.error.message
    assert "Traceback" not in caplog.text


FIRST_AND_LAST = replace(IMAGE_TO_VIDEO_INFO, min_images=2, max_images=2)


def test_a_first_and_a_last_image(engine, monkeypatch):
    app = make_app(engine, monkeypatch, FIRST_AND_LAST)
    red, blue = png(), png((0, 0, 250))
    url = "data:image/png;base64," + base64.b64encode(blue).decode()
    with_client(app, lambda client, http: client.videos.create_and_poll(prompt="a", input_reference=[red, blue]))
    pair = [("input_reference", ("a.png", red)), ("input_reference", ("b.png", blue))]
    assert post(app, files=pair, data={"prompt": "a"}).status_code == 200
    both = [{"image_url": url.replace(url, "data:image/png;base64," + base64.b64encode(red).decode())}]
    assert post(app, {**GOOD, "input_reference": [*both, {"image_url": url}]}).status_code == 200
    for request in engine.requests.values():
        assert [image.pixels[:3] for image in request.images] == [bytes((200, 30, 30)), bytes((0, 0, 250))]
    assert len(engine.requests) == 3


@pytest.mark.parametrize(
    ("files", "param", "says"),
    [
        ([], "input_reference", "2 images, the first frame and the last"),
        ([png()], "input_reference", '"1 image" is not valid: it must be 2 images'),
        ([png()] * 3, "input_reference", '"3 images" is not valid: it must be 2 images'),
        ([png(), b"no image"], "input_reference[1]", "decoded"),
    ],
)
def test_wrong_first_and_last_images(engine, monkeypatch, files, param, says):
    app = make_app(engine, monkeypatch, FIRST_AND_LAST)
    parts = [("prompt", (None, "a cat")), *(("input_reference[]", ("a.png", data)) for data in files)]
    if len(files) == 1:
        parts[-1] = ("input_reference", parts[-1][1])
    response = post(app, files=parts)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert says in response.json()["error"]["message"]


def test_one_frame_for_two_images(engine, monkeypatch):
    app = make_app(engine, monkeypatch, FIRST_AND_LAST)
    pair = [("input_reference[]", ("a.png", png()))] * 2
    response = post(app, files=pair, data={"prompt": "a cat", "num_frames": "1"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "num_frames")
    assert "at least 2" in response.json()["error"]["message"]
