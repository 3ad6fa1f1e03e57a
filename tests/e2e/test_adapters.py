"""Adapters through `vllm serve`: named, loaded and unloaded while requests run, and there again after a death."""

import base64
import io
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
import requests
from msgspec import UNSET
from msgspec.structs import replace
from PIL import Image
from vllm.lora.request import LoRARequest

from examples.vllm_server import VllmServer
from tests.adapters import make_adapter
from tests.e2e.conftest import START_TIMEOUT_S
from tests.e2e.server import session_processes, wait_for_running
from tests.families import load
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

pytestmark = pytest.mark.e2e

BODY = {"prompt": "a house", "size": "64x64", "seed": 1, "true_cfg_scale": 4.0, "negative_prompt": ""}
STEPS = 6
LONG = {"steps": 200, "size": "128x128"}  # long enough for something to happen meanwhile


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder, transformer = tmp_path_factory.mktemp("adapters"), load(model).transformer
    return {
        name: make_adapter(folder / f"{name}.safetensors", transformer, seed, size=0.3)
        for seed, name in enumerate(("pixel", "ink", "chalk"))
    }


@pytest.fixture(scope="module")
def server(model, files, tmp_path_factory):
    modules = [f"{name}={files[name]}" for name in ("pixel", "ink")]
    flags = ["--cfg-parallel-size", "2", "--enable-lora", "--max-loras", "2", "--lora-modules", *modules]
    at_run_time = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    log = tmp_path_factory.mktemp("serve") / "server.log"
    with VllmServer(model, [*flags, "--served-model-name", "house"], log, at_run_time) as server:
        server.wait_ready(START_TIMEOUT_S)
        yield server


def draw(server, steps=STEPS, **fields):
    """Status and image of a request."""
    body = BODY | {"num_inference_steps": steps} | fields
    answer = requests.post(f"{server.url}/v1/images/generations", json=body, timeout=600)
    return answer.status_code, answer.json()["data"][0]["b64_json"] if answer.ok else answer.text


def post(server, path, **body):
    return requests.post(f"{server.url}/v1/{path}", json=body, timeout=60)


def test_each_request_has_its_own_in_any_company_and_after_a_ranks_death(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    assert [model.id for model in client.models.list()] == ["house", "pixel", "ink"]
    asked = [
        {},
        {"model": "pixel"},
        {"lora": "ink"},
        {"lora": [{"name": "pixel", "scale": 0.5}, {"name": "ink", "scale": -1.0}]},
        {"model": "pixel", "true_cfg_scale": 1.0},
    ]
    alone = [draw(server, **fields) for fields in asked]
    assert {status for status, _ in alone} == {200}
    assert len({image for _, image in alone}) == len(asked)
    with ThreadPoolExecutor(2 * len(asked)) as pool:
        assert [*pool.map(lambda fields: draw(server, **fields), asked * 2)] == alone * 2
        dying = pool.submit(draw, server, **LONG, model="pixel")
        wait_for_running(server, 1, 30)
        ranks = [process for process in session_processes(server.process.pid) if "CfgRank1" in title(process)]
        os.kill(ranks[0].pid, signal.SIGKILL)
        assert dying.result()[0] == 200
    assert [draw(server, **fields) for fields in asked] == alone


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_adapters_come_and_go_while_requests_carry_them(server, files):
    path = str(files["chalk"])
    assert post(server, "load_lora_adapter", lora_name="chalk", lora_path=path).status_code == 200
    expected = draw(server, **LONG, model="chalk")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(draw, server, **LONG, model="chalk")
        wait_for_running(server, 1, 30)
        assert post(server, "unload_lora_adapter", lora_name="chalk").status_code == 200
        assert draw(server, model="chalk")[0] == 404
        assert running.result() == expected
    assert expected[0] == 200
    refused = post(server, "load_lora_adapter", lora_name="chalk", lora_path=str(files["ink"].with_name("none")))
    assert refused.status_code == 400
    assert "there is no file or folder" in refused.json()["error"]["message"]


def test_what_does_not_fit_is_refused_while_it_runs_and_at_the_start(server, model, files, tmp_path):
    wide = make_adapter(tmp_path / "wide.safetensors", load(model).transformer, rank=256, layers="to_q")
    answer = post(server, "load_lora_adapter", lora_name="wide", lora_path=str(wide))
    assert answer.status_code == 400
    assert "has rank 256, and --max-lora-rank is 128" in answer.json()["error"]["message"]
    assert [draw(server, lora=names)[0] for names in (["pixel"], ["pixel", "ink"], ["nobody"])] == [200, 200, 400]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--enable-lora"]
    ended = subprocess.run(
        [*command, "--lora-modules", f"wide={wide}", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode != 0
    assert "adapter 'wide' does not fit: " in ended.stdout + ended.stderr


def test_offline_the_images_are_those_of_the_server(server, model, files):
    params = DiffusionParams(
        height=64, width=64, seed=1, num_inference_steps=STEPS, true_cfg_scale=4.0, negative_prompt="", lora="pixel"
    )
    with DiffusionLLM(str(model), enable_lora=True, lora_modules={"pixel": str(files["pixel"])}) as llm:
        by_name, none = llm.generate(["a house"] * 2, [params, without_adapters(params)], use_tqdm=False)
        request = LoRARequest("also pixel", 1, str(files["pixel"]))
        [by_request] = llm.generate("a house", without_adapters(params), use_tqdm=False, lora_request=request)
        with pytest.raises(
            ValueError, match=r"lora_path=.* is not valid: it must be that of an adapter for this model"
        ):
            llm.generate("a house", lora_request=LoRARequest("gone", 2, "/none"))
    assert by_name.images[0].tobytes() == by_request.images[0].tobytes() != none.images[0].tobytes()
    served = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused").images.generate(
        model="pixel", prompt="a house", size="64x64", extra_body={**BODY, "num_inference_steps": STEPS}
    )
    assert picture_of(served.data[0].b64_json).tobytes() == by_name.images[0].tobytes()


def without_adapters(params):
    return replace(params, lora=UNSET)


def picture_of(b64_json):
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))
