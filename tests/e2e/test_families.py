"""Every family through a real `vllm serve --cfg-parallel-size 2` and offline: what diffusers' own pipeline draws."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import av
import msgspec
import numpy as np
import pytest
import torch
from openai import OpenAI
from PIL import Image

from examples.vllm_server import VllmServer
from tests.e2e.conftest import START_TIMEOUT_S
from tests.families import FAMILIES, SEED, call
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.pipelines.registry import describe

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:The Sora API")]


def one_of_each_class():
    """Over HTTP every class is served once; further layouts of one differ in the engine alone, which runs offline."""
    classes = {}
    for family in FAMILIES:
        classes.setdefault(family.class_name, family)
    return list(classes.values())


def expected_pictures(family, folder):
    """For each case what diffusers draws: uint8 [number, height, width, channels]."""
    torch.set_num_threads(1)
    reference = family.reference(folder)
    drawn = []
    for i, case in enumerate(family.cases):
        pictures = call(reference, case, SEED + i, output_type="pil")
        pictures = pictures[0] if isinstance(pictures[0], list) else pictures  # of a video or the layers of an image
        drawn.append(np.stack([np.asarray(picture) for picture in pictures]))
    return drawn


def assert_alike(pictures, expected, case, most=1):
    """At most so many levels of difference; `expected` is no uniform grey."""
    assert pictures.shape == expected.shape, case.mode
    assert expected.std() > 10, case.mode
    assert np.abs(pictures.astype(np.int16) - expected.astype(np.int16)).max() <= most, case.mode


def file_of(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def ask_for_images(client, case, seed):
    fields = dict(case.params) | {"seed": seed}
    height, width = fields.pop("height", None), fields.pop("width", None)
    size = f"{width}x{height}" if height else "auto"
    if case.images:
        files = [file_of(image) for image in case.images]
        answer = client.images.edit(image=files, prompt=case.prompt, size=size, extra_body=fields)
    else:
        answer = client.images.generate(prompt=case.prompt, size=size, extra_body=fields)
    images = [Image.open(io.BytesIO(base64.b64decode(entry.b64_json))) for entry in answer.data]
    return np.stack([np.asarray(image) for image in images])


def ask_for_a_video(client, case, seed):
    fields = dict(case.params) | {"seed": seed}
    size = f"{fields.pop('width')}x{fields.pop('height')}"
    reference = {"input_reference": file_of(case.images[0])} if case.images else {}
    video = client.videos.create_and_poll(
        prompt=case.prompt, size=size, extra_body=fields, poll_interval_ms=100, **reference
    )
    assert video.status == "completed", video.error
    with av.open(io.BytesIO(client.videos.download_content(video.id).content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("family", one_of_each_class(), ids=lambda family: family.label)
def test_served(family, tmp_path):
    folder = family.build(tmp_path / "model")
    expected = expected_pictures(family, folder)
    makes_videos = describe(Checkpoint(str(folder))).produces == "video"
    ask = ask_for_a_video if makes_videos else ask_for_images
    with VllmServer(folder, ["--cfg-parallel-size", "2"], tmp_path / "server.log") as server:
        server.wait_ready(START_TIMEOUT_S)
        with (
            OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120) as client,
            ThreadPoolExecutor(len(family.cases)) as pool,
        ):
            seeds = range(SEED, SEED + len(family.cases))
            answers = list(pool.map(lambda case, seed: ask(client, case, seed), family.cases, seeds))
    for case, pictures, drawn in zip(family.cases, answers, expected, strict=True):
        if makes_videos:  # a compressed one of noise
            assert pictures.shape == drawn.shape
            assert np.abs(pictures.astype(float) - drawn).mean() < 0.3 * np.abs(drawn - drawn.mean()).mean() + 10
        else:
            assert_alike(pictures, drawn, case)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label)
def test_offline(family, tmp_path):
    folder = family.build(tmp_path / "model")
    prompts = [
        {"prompt": case.prompt, **({"image": list(case.images)} if case.images else {})} for case in family.cases
    ]
    params = [
        msgspec.convert({**case.params, "seed": SEED + i}, DiffusionParams) for i, case in enumerate(family.cases)
    ]
    with DiffusionLLM(str(folder), cfg_parallel_size=2) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for case, output, drawn in zip(family.cases, outputs, expected_pictures(family, folder), strict=True):
        assert output.error is None, case.mode
        pictures = output.frames or output.images
        assert_alike(np.stack([np.asarray(picture) for picture in pictures]), drawn, case)
