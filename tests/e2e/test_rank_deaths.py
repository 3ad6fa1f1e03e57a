"""Ranks are killed and stopped under traffic: clients see a delay and the same bytes, and of too many deaths an end."""

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import psutil
import pytest
import requests

from benchmarks.chaos import FAULTS
from benchmarks.endurance import processes
from examples.vllm_server import VllmServer
from tests.e2e.conftest import START_TIMEOUT_S
from tests.e2e.server import Footprint
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams
from vllm_cfg_plugin.engine import plan as wire
from vllm_cfg_plugin.errors import RankDiedError
from vllm_cfg_plugin.executor import channel
from vllm_cfg_plugin.executor.rank_pool import RankPool
from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline
from vllm_cfg_plugin.worker.worker import DiffusionWorker

pytestmark = pytest.mark.e2e

CLIENTS = 16
RESTARTS = 9  # the faults below take eight
FLAGS = ["--cfg-parallel-size", "2", "--cfg-max-restarts", str(RESTARTS), "--cfg-step-timeout", "4"]


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    routes_of_sleep = {"VLLM_SERVER_DEV_MODE": "1"}
    with VllmServer(model, FLAGS, tmp_path_factory.mktemp("deaths") / "server.log", routes_of_sleep) as server:
        server.wait_ready(START_TIMEOUT_S)
        yield server


def draw(server: VllmServer, number: int) -> tuple[int, str]:
    """Status and body's images of one of 16 unlike requests."""
    body = {
        "prompt": f"a house, number {number}",
        "size": ("64x64", "128x64", "96x96", "256x256")[number % 4],
        "num_inference_steps": 40 + 4 * number,
        "seed": number,
        "true_cfg_scale": 4.0 if number % 2 else 1.0,
        "negative_prompt": "" if number % 2 else None,
    }
    answer = requests.post(f"{server.url}/v1/images/generations", json=body, timeout=120)
    return answer.status_code, answer.json()["data"][0]["b64_json"] if answer.ok else answer.text


@pytest.fixture(scope="module")
def calm(server) -> list[tuple[int, str]]:
    return [draw(server, number) for number in range(CLIENTS)]


def health_while(server: VllmServer, work) -> list[int]:
    """The status codes of /health while `work` runs."""
    codes, done = [], threading.Event()

    def ask():
        while not done.is_set():
            codes.append(requests.get(f"{server.url}/health", timeout=10).status_code)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            work()
        finally:
            done.set()
        asking.result()
    return codes


@pytest.mark.parametrize("fault", FAULTS)
def test_clients_see_a_delay_and_the_same_bytes(server, calm, fault):
    def harmed() -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = [pool.submit(draw, server, number) for number in range(CLIENTS)]
            time.sleep(0.3)
            FAULTS[fault](server, random.Random(1))
            assert [answer.result() for answer in answers] == calm

    codes = health_while(server, harmed)
    assert set(codes) == {200, 503}
    server.wait_ready(START_TIMEOUT_S)  # the last fault may come after the last answer


def test_a_stream_survives_a_rank_and_repeats_no_preview(server):
    """A stream goes on when a rank dies and repeats no preview."""
    body = {"prompt": "a cat", "size": "256x256", "num_inference_steps": 150, "seed": 3}
    calm = requests.post(f"{server.url}/v1/images/generations", json=body, timeout=120).json()["data"][0]["b64_json"]
    events = []
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        extra = {"seed": 3, "num_inference_steps": 150}
        asked = {"prompt": "a cat", "size": "256x256", "stream": True, "partial_images": 3, "extra_body": extra}
        for event in client.images.generate(**asked):
            if not events:
                os.kill(processes(server)["CfgRank1"].pid, signal.SIGKILL)
            events.append(event)
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]
    assert events[-1].b64_json == calm


def test_ranks_that_die_idle_are_there_for_who_comes(server, calm):
    """Ranks that die while nobody asks are there for who comes."""
    before = processes(server)["CfgRank0"].pid
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while (rank := processes(server).get("CfgRank0")) is None or rank.pid == before:
        assert time.monotonic() < deadline, "nobody noticed"
        time.sleep(0.1)
    assert draw(server, 5) == calm[5]


@pytest.mark.parametrize(("level", "left"), [(1, {"CfgTemplate"}), (2, set())])
def test_a_sleeping_server_has_no_ranks_and_its_requests_wait(server, calm, level, left):
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(draw, server, 7)
        time.sleep(0.2)
        for _ in range(2):  # the second time it sleeps already
            assert requests.post(f"{server.url}/sleep?level={level}&mode=keep", timeout=60).ok
        assert requests.get(f"{server.url}/is_sleeping", timeout=10).json() == {"is_sleeping": True}
        assert requests.get(f"{server.url}/health", timeout=10).ok, "who sent it to sleep does not want it replaced"
        waiting = pool.submit(draw, server, 8)
        assert {title for title in processes(server) if title.startswith("Cfg")} == left
        assert requests.post(f"{server.url}/wake_up", timeout=60).ok
        assert [running.result(), waiting.result()] == calm[7:9]


def test_after_too_many_deaths_the_server_ends_and_says_why(server, calm):
    """After too many deaths the server ends in an error that says why."""
    footprint = Footprint.of(server)
    deadline = time.monotonic() + 60
    while server.process.poll() is None and time.monotonic() < deadline:
        if rank := processes(server).get("CfgRank1"):
            rank.kill()
        time.sleep(1)
    assert server.process.wait(30) == 1
    assert footprint.leftovers() == []
    assert f"cfg_max_restarts={RESTARTS} allows no further start" in server.log_tail(1)


def test_ranks_that_die_while_they_measure_are_started_anew(model, monkeypatch, tmp_path):
    """In this process, which does not hide the error of those that die each time."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    measure, died = DiffusionWorker.calibrate, tmp_path / "died"

    def die_once(self):
        if self.rank == 1 and not died.exists():
            died.touch()
            os._exit(1)
        return measure(self)

    monkeypatch.setattr(DiffusionWorker, "calibrate", die_once)
    params = DiffusionParams(height=64, width=64, num_inference_steps=2, seed=1)
    with DiffusionLLM(str(model), cfg_parallel_size=2) as llm:
        assert llm.generate("a house", params, use_tqdm=False)[0].error is None
    died.unlink()
    with pytest.raises(RankDiedError, match=r"cfg rank 1 .* ended with code 1; cfg_max_restarts=0 allows no further"):
        DiffusionLLM(str(model), cfg_parallel_size=2, cfg_max_restarts=0)
    titles = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert not [title for title in titles if "Cfg" in title], "the engine that could not start leaves nothing"


def test_a_request_that_kills_ranks_fails_alone(model, monkeypatch):
    """In this process, whose patched pipeline the ranks are forked with."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    encode = QwenImagePipeline.encode_branch

    def encode_or_die(self, request, branch):
        if request.prompts[0] == "poison":
            os._exit(1)
        return encode(self, request, branch)

    monkeypatch.setattr(QwenImagePipeline, "encode_branch", encode_or_die)
    params = DiffusionParams(height=64, width=64, num_inference_steps=4, seed=1)
    with DiffusionLLM(str(model), cfg_parallel_size=2) as llm:
        (alone,) = llm.generate("a house", params, use_tqdm=False)
        outputs = llm.generate(["a house", "poison", "a house"], params, use_tqdm=False)
    assert "the cfg ranks died 5 times while they worked on it" in outputs[1].error
    for output in (outputs[0], outputs[2]):
        assert np.array_equal(np.asarray(output.images[0]), np.asarray(alone.images[0]))


@pytest.mark.parametrize(("processes_of_a_rank", "killed"), [(1, "CfgRank1"), (2, "CfgRank1.1")])
def test_a_video_goes_on_from_where_it_was_kept(video_model, monkeypatch, processes_of_a_rank, killed):
    """A rank of this process's engine is killed after the seventh of twelve steps."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    params = DiffusionParams(height=32, width=32, num_frames=9, num_inference_steps=12, guidance_scale=5.0, seed=1)
    send, advanced = RankPool.send_to_all, []

    def send_and_kill(self, kind, number, payload, merge):
        pending = send(self, kind, number, payload, merge)
        if kind == channel.PLAN and wire.decode_plan(payload).advance:
            advanced.append(number)
            if len(advanced) == 7:
                pending.result()
                titles = {process: " ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)}
                next(process for process, title in titles.items() if killed in title).kill()
        return pending

    sizes = {"cfg_parallel_size": 2, "sequence_parallel_size": processes_of_a_rank}
    with DiffusionLLM(str(video_model), **sizes) as llm:
        (calm,) = llm.generate("a cat", params, use_tqdm=False)
        monkeypatch.setattr(RankPool, "send_to_all", send_and_kill)
        (harmed,) = llm.generate("a cat", params, use_tqdm=False)
    assert np.array_equal(np.asarray(harmed.frames), np.asarray(calm.frames))
    assert 12 < len(advanced) <= 12 + 4, "steps 6 and 7 were taken again, and plans were under way"
