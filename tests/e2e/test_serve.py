"""`vllm serve --cfg-parallel-size 2` through the official openai client."""

import base64
import http.client
import io
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import requests
from PIL import Image

from examples.vllm_server import HOST, VllmServer
from tests.e2e import javascript_client
from tests.e2e.conftest import START_TIMEOUT_S
from tests.e2e.endings import end_amid_a_request
from tests.e2e.scripts import flags, run
from tests.e2e.server import gauge, wait_for_running

pytestmark = pytest.mark.e2e

SERVED_NAMES = ("tiny", "alias")
PLACES = 50  # more results than run at once, and more than the storm below has

# Long enough to be found running by a client that then does something else.
SLOW = {"size": "512x512", "num_inference_steps": 200, "true_cfg_scale": 4.0, "negative_prompt": "", "n": 2}

MIXED = [
    {"prompt": "a red house", "size": "64x64", "num_inference_steps": 8, "true_cfg_scale": 4.0, "negative_prompt": " "},
    {"prompt": "a", "size": "128x64", "num_inference_steps": 3, "negative_prompt": None},
    {"prompt": "many words of a long prompt " * 10, "size": "64x96", "num_inference_steps": 12, "true_cfg_scale": 2.0},
    {"prompt": "two cats", "size": "128x128", "num_inference_steps": 5, "true_cfg_scale": 0, "negative_prompt": "dogs"},
    {"prompt": "a blue car", "size": "64x64", "num_inference_steps": 20, "true_cfg_scale": 7.5, "negative_prompt": ""},
    {
        "prompt": "fog",
        "size": "96x96",
        "num_inference_steps": 7,
        "true_cfg_scale": 3.0,
        "negative_prompt": "a sunny day",
    },
    {"prompt": "snow", "size": "64x64", "num_inference_steps": 9, "true_cfg_scale": 1.5, "negative_prompt": "", "n": 2},
]


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    options = ["--cfg-parallel-size", "2", "--served-model-name", *SERVED_NAMES, "--max-num-queued-reqs", str(PLACES)]
    with VllmServer(model, options, tmp_path_factory.mktemp("server") / "server.log") as server:
        server.wait_ready(START_TIMEOUT_S)
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def generate(client, prompt="a house", size="64x64", n=1, output_format="png", **extra):
    return client.images.generate(
        model="tiny", prompt=prompt, size=size, n=n, output_format=output_format, extra_body={"seed": 11, **extra}
    )


def pixels(image) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json))))


def test_a_mixed_batch_at_once(client):
    with ThreadPoolExecutor(len(MIXED)) as pool:
        responses = list(pool.map(lambda fields: generate(client, **fields), MIXED))
    for fields, response in zip(MIXED, responses, strict=True):
        width, height = map(int, fields["size"].split("x"))
        assert response.size == fields["size"]
        assert len(response.data) == fields.get("n", 1)
        for index, image in enumerate(response.data):
            assert pixels(image).shape == (height, width, 3)
            assert image.seed == image.metrics["seed"] == 11 + index
            assert image.metrics["steps"] == fields["num_inference_steps"]
            assert image.metrics["e2e_time_ms"] >= image.metrics["denoise_ms"] > 0
    guided = [response.data[0].metrics["guided"] for response in responses]
    assert guided == [True, False, False, False, True, True, True]
    assert "no negative prompt" in responses[2].data[0].metrics["guidance_off"]
    assert "not above 1" in responses[3].data[0].metrics["guidance_off"]


def test_an_image_depends_on_its_request_alone(client):
    alone = [[pixels(image) for image in generate(client, **fields).data] for fields in MIXED]
    with ThreadPoolExecutor(len(MIXED)) as pool:
        together = list(pool.map(lambda fields: generate(client, **fields), reversed(MIXED)))
    for images, response in zip(alone, reversed(together), strict=True):
        for image, other in zip(images, response.data, strict=True):
            assert np.array_equal(image, pixels(other))


def test_a_cache_of_steps_is_one_requests_own(client):
    asked = {"num_inference_steps": 8, "true_cfg_scale": 4.0, "negative_prompt": ""}
    plain = generate(client, **asked).data[0]
    cached = generate(client, **asked, cache="static", cache_branches="negative").data[0]
    assert (cached.metrics["computed_steps"], cached.metrics["reused_steps"]) == ([8, 4], [0, 4])
    assert (plain.metrics["computed_steps"], plain.metrics["reused_steps"]) == ([8, 8], [0, 0])
    assert not np.array_equal(pixels(cached), pixels(plain))
    with pytest.raises(openai.BadRequestError, match="cache_order"):
        generate(client, **asked, cache_order=1)


def test_n_images_are_the_images_of_their_seeds(client):
    several = generate(client, n=3, num_inference_steps=4)
    for index, image in enumerate(several.data):
        single = generate(client, num_inference_steps=4, seed=11 + index)
        assert np.array_equal(pixels(image), pixels(single.data[0]))


def test_an_unset_seed_is_drawn_and_can_be_used_again(client):
    first, second = (generate(client, seed=None, num_inference_steps=4).data[0] for _ in range(2))
    assert first.seed != second.seed
    assert np.array_equal(pixels(first), pixels(generate(client, seed=first.seed, num_inference_steps=4).data[0]))


def test_a_stream_shows_previews_and_ends_in_the_same_image(client):
    asked = {"size": "256x256", "num_inference_steps": 150, "true_cfg_scale": 4.0, "negative_prompt": ""}
    with ThreadPoolExecutor(1) as pool:  # another one steps beside it
        other = pool.submit(generate, client, **asked, n=2)
        *previews, last = client.images.generate(
            model="tiny",
            prompt="a house",
            size=asked.pop("size"),
            stream=True,
            partial_images=3,
            extra_body={"seed": 11, **asked},
        )
        plain = other.result().data[0]
    assert [event.partial_image_index for event in previews] == [0, 1, 2]
    assert all(pixels(event).shape == (256, 256, 3) for event in previews)
    assert (last.type, last.b64_json) == ("image_generation.completed", plain.b64_json)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_output_formats(client, output_format):
    response = generate(client, output_format=output_format, num_inference_steps=2)
    image = Image.open(io.BytesIO(base64.b64decode(response.data[0].b64_json)))
    assert image.format == output_format.upper()
    assert response.output_format == output_format


def test_models_health_and_metrics(server, client):
    assert {model.id for model in client.models.list()} == {"tiny", "alias"}
    assert requests.get(f"{server.url}/health", timeout=10).status_code == 200
    before = gauge(server, "vllm:request_success_total")
    generate(client, num_inference_steps=2)
    assert gauge(server, "vllm:request_success_total") == before + 1
    assert gauge(server, "vllm:num_requests_running") == 0
    assert gauge(server, "vllm:num_requests_waiting") == 0


BAD = [
    ({"prompt": 7}, "prompt"),
    ({"prompt": "word " * 3000}, "prompt"),
    ({"negative_prompt": "word " * 3000}, "negative_prompt"),
    ({"size": "big"}, "size"),
    ({"size": "0x64"}, "size"),
    ({"size": "-64x64"}, "size"),
    ({"size": "63x64"}, "size"),
    ({"size": "100000x100000"}, "size"),
    ({"n": 0}, "n"),
    ({"n": 11}, "n"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 201}, "num_inference_steps"),
    ({"true_cfg_scale": -1}, "true_cfg_scale"),
    ({"true_cfg_scale": float("nan")}, "true_cfg_scale"),
    ({"guidance_scale": 4.0}, "guidance_scale"),  # Qwen-Image's is true_cfg_scale
    ({"seed": 2**63}, "seed"),
    ({"output_format": "bmp"}, "output_format"),
    ({"response_format": "file"}, "response_format"),
    ({"stream": True, "partial_images": 4}, "partial_images"),
    ({"partial_images": 1}, "partial_images"),
    ({"cfg_scale": 3}, "cfg_scale"),
]


def test_bad_input_is_refused_while_others_run(server, client):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, client, **{**SLOW, "num_inference_steps": 60})
        wait_for_running(server, 2, timeout_s=20)
        for change, param in BAD:
            body = json.dumps({"prompt": "a", **change})  # the official client can't send NaN
            headers = {"Content-Type": "application/json"}
            answer = requests.post(f"{server.url}/v1/images/generations", data=body, headers=headers, timeout=10)
            assert answer.status_code == 400, change
            assert answer.json()["error"]["param"] == param
            assert "is not valid: " in answer.json()["error"]["message"]
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(prompt="a", n=11)
        assert refused.value.param == "n"
        with pytest.raises(openai.NotFoundError) as missing:
            client.images.generate(model="gpt-image-2", prompt="a")
        assert missing.value.param == "model"
        assert len(running.result().data) == 2


def test_a_disconnect_takes_the_request_out_of_the_batch(server, client):
    def send_and_give_up():
        with pytest.raises(requests.Timeout):
            requests.post(f"{server.url}/v1/images/generations", json={"prompt": "a", **SLOW}, timeout=1.5)

    aborted = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"}'
    before = gauge(server, aborted)
    thread = threading.Thread(target=send_and_give_up)
    thread.start()
    wait_for_running(server, 2, timeout_s=20)
    thread.join()
    started = time.monotonic()
    wait_for_running(server, 0, timeout_s=5)
    assert time.monotonic() - started < 3
    assert gauge(server, "vllm:num_requests_waiting") == 0
    assert gauge(server, aborted) == before + 2
    assert len(generate(client, num_inference_steps=2).data) == 1


def leave_open(server, **body) -> http.client.HTTPConnection:
    """Send a request and read no answer; whoever closes the connection has left."""
    connection = http.client.HTTPConnection(HOST, server.port)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/images/generations", json.dumps({"prompt": "a", **body}), headers)
    return connection


def wait_for_unfinished(server, count: int) -> None:
    deadline = time.monotonic() + 20
    while (found := sum(gauge(server, f"vllm:num_requests_{state}") for state in ("running", "waiting"))) != count:
        assert time.monotonic() < deadline, f"{found} results are unfinished, not {count}"
        time.sleep(0.05)


def test_a_full_queue_has_room_when_a_waiting_client_leaves(server, client):
    """A full queue has room again when a waiting client leaves."""
    connections = [leave_open(server, **{**SLOW, "n": 10}) for _ in range(PLACES // 10)]
    try:
        wait_for_unfinished(server, PLACES)
        assert gauge(server, "vllm:num_requests_waiting") >= 10
        with pytest.raises(openai.RateLimitError) as refused:
            generate(client)
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        connections[-1].close()  # its results are the last ones in the line
        wait_for_unfinished(server, PLACES - 10)
        connections.append(leave_open(server, **{**SLOW, "n": 10}))
        wait_for_unfinished(server, PLACES)
    finally:
        for connection in connections:
            connection.close()
    wait_for_unfinished(server, 0)
    assert len(generate(client, num_inference_steps=2).data) == 1


def random_request(rng: random.Random) -> dict:
    return {
        "prompt": "word " * rng.randint(1, 60),
        "seed": rng.randint(0, 5),
        "size": f"{rng.choice([32, 64, 128])}x{rng.choice([32, 64, 96])}",
        "num_inference_steps": rng.randint(2, 20),
        "negative_prompt": rng.choice([None, "", "bad word " * 9]),
        "true_cfg_scale": rng.choice([0, 1, 2.5, 7]),
        "n": rng.choice([1, 1, 1, 3]),
    }


def test_a_storm_of_requests_and_disconnects(server):
    """Every request is sent twice, at a random moment, among others that give up: the same images both times."""
    rng = random.Random(0)
    bodies = [random_request(rng) for _ in range(25)]
    jobs = [(index, 60.0) for index in range(len(bodies))] * 2
    jobs += [(rng.randrange(len(bodies)), rng.uniform(0.05, 0.5)) for _ in range(20)]
    rng.shuffle(jobs)
    answers: dict[int, list[list[str]]] = {index: [] for index in range(len(bodies))}

    def send(job: tuple[int, float]) -> None:
        index, timeout = job
        try:
            answer = requests.post(f"{server.url}/v1/images/generations", json=bodies[index], timeout=timeout)
        except requests.Timeout:
            return
        assert answer.status_code == 200, answer.text
        answers[index].append([image["b64_json"] for image in answer.json()["data"]])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(send, jobs))
    for index, images in answers.items():
        assert len(images) >= 2
        assert all(other == images[0] for other in images), bodies[index]
    wait_for_running(server, 0, timeout_s=5)
    assert gauge(server, "vllm:num_requests_waiting") == 0


def test_the_examples_client_draws_an_image(server, tmp_path):
    arguments = flags(
        url=f"{server.url}/v1",
        prompt="a rocket",
        negative_prompt="ugly",
        true_cfg_scale=4.0,
        num_inference_steps=40,
        size="64x32",
        seed=1,
        previews=1,
        output="rocket.png",
    )
    assert "saved rocket.png" in run("openai_client.py", *arguments, cwd=tmp_path)
    assert Image.open(tmp_path / "rocket.png").size == (64, 32)


@pytest.fixture(scope="module")
def javascript(tmp_path_factory):
    """A folder with the scripts and what they import."""
    folder = tmp_path_factory.mktemp("javascript")
    javascript_client.install(folder)
    return folder


def test_a_person_at_the_page(server, javascript):
    shot = javascript / "page.png"
    seen = javascript_client.run(javascript, "page.mjs", f"{server.url}/", str(shot))
    assert seen["model"] == "tiny"
    assert seen["previewed"] == "data:image/png;base64,"
    assert seen["state"].startswith("seed 5, ")
    assert (seen["prompt"], seen["hurt"]) == ('<img src=x onerror="window.hurt=1">', 0)
    assert seen["again"] == ["5", seen["prompt"]]
    assert "n=11" in seen["error"]
    assert [lane.strip() for lane in seen["lanes"][1:]] == ["engine 0 rank 0", "engine 0 rank 1"]
    assert [problem for problem in seen["problems"] if "400" not in problem] == []
    assert set(seen["requested"]) == {server.url, "null"}, "nothing comes from elsewhere"
    assert Image.open(shot).size == (1100, 760)


def test_the_javascript_client(server, javascript):
    seen = javascript_client.run(javascript, "client.mjs", f"{server.url}/v1", "tiny")
    assert (seen["models"], seen["retrieved"]) == (["tiny", "alias"], "tiny")
    assert seen["plain"] == seen["linked"] == seen["streamed"]
    assert seen["usage"] > 16
    assert seen["events"][-1] == "image_generation.completed"
    assert seen["refused"] == ["BadRequestError", 400, "n"]
    assert seen["missing"] == ["NotFoundError", 404]
    assert seen["left"] == "APIUserAbortError"
    wait_for_running(server, 0, timeout_s=5)


def test_nothing_is_left_behind(server):
    """The last test here: it ends the server."""
    end_amid_a_request(server, "SIGTERM", json={"prompt": "a", **SLOW, "n": 1})
