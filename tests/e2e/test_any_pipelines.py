"""Pipelines that run as diffusers' own, in vLLM's server application and offline, on two ranks."""

import asyncio
import base64
import io
import threading

import numpy as np
import openai
import psutil
import pytest
import torch
from PIL import Image

from tests.any_pipelines import ANY_PIPELINES
from tests.e2e.app import served
from tests.e2e.test_families import assert_alike, file_of
from tests.families import SEED, call
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

pytestmark = pytest.mark.e2e

BY_NAME = {family.class_name: family for family in ANY_PIPELINES}


def drawn(family, folder):
    """What diffusers draws of each case: uint8 [number, height, width, channels]."""
    torch.set_num_threads(1)
    reference = family.reference(folder)
    results = [call(reference, case, SEED + i, output_type="pil") for i, case in enumerate(family.cases)]
    return [np.stack([np.asarray(picture) for picture in pictures]) for pictures in results]


def pixels(answer):
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))) for entry in answer.data])


def test_an_image_with_a_mask_is_edited(tmp_path):
    family = BY_NAME["StableDiffusionXLInpaintPipeline"]
    folder = family.build(tmp_path / "model")
    (case,), (expected,) = family.cases, drawn(family, folder)
    image, mask = (file_of(picture) for picture in case.images)
    fields = {name: value for name, value in case.params.items() if name not in ("height", "width")}

    async def ask():
        async with served(folder, "--cfg-parallel-size", "2") as client:

            def edit(**extra):
                return client.images.edit(
                    image=image, mask=mask, prompt=case.prompt, size="64x64", extra_body=fields | extra
                )

            answers = await asyncio.gather(*(edit(seed=SEED) for _ in range(3)), edit(seed=1, num_inference_steps=2))
            refused = []
            for wrong in ({"strenght": 0.5}, {"strength": "a lot"}, {"clip_skip": 1.5}, {"padding_mask_crop": -3}):
                with pytest.raises(openai.BadRequestError) as error:
                    await edit(**wrong)
                refused.append(error.value.body["message"])
            with pytest.raises(openai.BadRequestError, match="an image and its mask"):
                await client.images.edit(image=image, prompt=case.prompt, size="64x64")
            return [pixels(answer) for answer in answers], refused

    (*alike, other), refused = asyncio.run(ask())
    for picture in alike:
        assert_alike(picture, expected, case)
        assert (picture == alike[0]).all()
    assert (other != alike[0]).any()
    assert "did you mean strength?" in refused[0]
    assert "of the type float" in refused[1]
    assert "of the type int" in refused[2]
    assert "StableDiffusionXLInpaintPipeline refuses the request" in refused[3]


def kill_a_rank():
    ranks = [child for child in psutil.Process().children(recursive=True) if "CfgRank1" in " ".join(child.cmdline())]
    ranks[0].kill()


def test_offline_requests_share_the_ranks_and_outlive_one(tmp_path):
    family = BY_NAME["Lumina2Pipeline"]
    folder = family.build(tmp_path / "model")
    own = {"cfg_trunc_ratio"}
    params = [
        DiffusionParams(
            **{name: value for name, value in case.params.items() if name not in own},
            extra={name: value for name, value in case.params.items() if name in own},
            seed=SEED + i,
        )
        for i, case in enumerate(family.cases)
    ]
    with DiffusionLLM(str(folder), cfg_parallel_size=2) as llm:
        outputs = llm.generate([case.prompt for case in family.cases], params, use_tqdm=False)
        long = DiffusionParams(height=32, width=32, num_inference_steps=150, seed=7)
        (undisturbed,) = llm.generate("a fox", long, use_tqdm=False)
        killer = threading.Timer(undisturbed.metrics.e2e_time_ms / 2000, kill_a_rank)
        killer.start()
        (disturbed,) = llm.generate("a fox", long, use_tqdm=False)
        killer.join()
    for case, output, expected in zip(family.cases, outputs, drawn(family, folder), strict=True):
        assert output.error is None, case.mode
        assert output.metrics.guided
        assert_alike(np.stack([np.asarray(picture) for picture in output.images]), expected, case)
    assert (undisturbed.error, disturbed.error) == (None, None)
    assert np.array_equal(*(np.asarray(output.images[0]) for output in (undisturbed, disturbed)))
