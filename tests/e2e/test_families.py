"""Every family in vLLM's own server application and offline, on two ranks: what diffusers' own pipeline draws.

The application runs within this process; that the `vllm serve` command runs it too is shown for images, edits and
videos by the other tests.
"""

import asyncio
import base64
import io
import tempfile
from pathlib import Path

import av
import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from tests.e2e.app import served
from tests.families import FAMILIES, SEED, call
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.entrypoints.videos.file import write_video
from vllm_cfg_plugin.pipelines.registry import describe

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:The Sora API")]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.label)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return family.build(tmp_path_factory.mktemp("family") / "model")


@pytest.fixture(scope="module")
def expected(family, folder):
    """For each case what diffusers draws: uint8 [number, height, width, channels]."""
    torch.set_num_threads(1)
    reference = family.reference(folder)
    drawn = []
    for i, case in enumerate(family.cases):
        pictures = call(reference, case, SEED + i, output_type="pil")
        pictures = pictures[0] if isinstance(pictures[0], list) else pictures  # of a video or the layers of an image
        drawn.append(np.stack([np.asarray(picture) for picture in pictures]))
    return drawn


def assert_alike(pictures, expected, case):
    """At most one level of difference; `expected` is no uniform grey."""
    assert pictures.shape == expected.shape, case.mode
    assert expected.std() > 10, case.mode
    assert np.abs(pictures.astype(np.int16) - expected.astype(np.int16)).max() <= 1, case.mode


def decoded(file):
    """uint8 [number, height, width, channels] of a video file, a path or bytes."""
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def assert_same_video(frames, expected, case):
    """As what diffusers draws, compressed by the same encoder: the pictures are noise, of which that loses much."""
    assert frames.shape == expected.shape, case.mode
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        write_video(Path(file.name), expected, 16)
        compressed = decoded(file.name)
    assert np.abs(frames.astype(float) - compressed).mean() < 10, case.mode  # another one of noise: above 80


def file_of(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


async def ask_for_images(client, case, seed):
    fields = dict(case.params) | {"seed": seed}
    height, width = fields.pop("height", None), fields.pop("width", None)
    size = f"{width}x{height}" if height else "auto"
    if case.images:
        files = [file_of(image) for image in case.images]
        answer = await client.images.edit(image=files, prompt=case.prompt, size=size, extra_body=fields)
    else:
        answer = await client.images.generate(prompt=case.prompt, size=size, extra_body=fields)
    images = [Image.open(io.BytesIO(base64.b64decode(entry.b64_json))) for entry in answer.data]
    return np.stack([np.asarray(image) for image in images])


async def ask_for_a_video(client, case, seed):
    fields = dict(case.params) | {"seed": seed}
    size = f"{fields.pop('width')}x{fields.pop('height')}"
    reference = {"input_reference": file_of(case.images[0])} if case.images else {}
    video = await client.videos.create_and_poll(
        prompt=case.prompt, size=size, extra_body=fields, poll_interval_ms=100, **reference
    )
    assert video.status == "completed", video.error
    file = await client.videos.download_content(video.id)
    return decoded(io.BytesIO(file.content))


async def ask_for_all(folder, family, ask):
    """The answers to all cases, asked for at once."""
    async with served(folder, "--cfg-parallel-size", "2") as client:
        return await asyncio.gather(*(ask(client, case, SEED + i) for i, case in enumerate(family.cases)))


def test_served(family, folder, expected):
    if family.cases[0].image_names[1:] and len(family.cases[0].images) > 1:
        pytest.skip("the official client brings one image for a video")
    makes_videos = describe(Checkpoint(str(folder))).produces == "video"
    ask, check = (ask_for_a_video, assert_same_video) if makes_videos else (ask_for_images, assert_alike)
    answers = asyncio.run(ask_for_all(folder, family, ask))
    for case, pictures, drawn in zip(family.cases, answers, expected, strict=True):
        check(pictures, drawn, case)


def test_offline(family, folder, expected):
    prompts = [
        {"prompt": case.prompt, **({"image": list(case.images)} if case.images else {})} for case in family.cases
    ]
    params = [
        msgspec.convert({**case.params, "seed": SEED + i}, DiffusionParams) for i, case in enumerate(family.cases)
    ]
    with DiffusionLLM(str(folder), cfg_parallel_size=2) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for case, output, drawn in zip(family.cases, outputs, expected, strict=True):
        assert output.error is None, case.mode
        pictures = output.frames or output.images
        assert_alike(np.stack([np.asarray(picture) for picture in pictures]), drawn, case)
