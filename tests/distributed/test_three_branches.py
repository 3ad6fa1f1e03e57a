"""Guidance of three branches on 1, 2 and 3 real gloo ranks: bitwise the serial formula, alone and in a batch."""

import msgspec
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from PIL import Image

from tests.contract import branches_of, make_request
from tests.distributed.engine_ranks import run_ranks
from tests.model_builders.qwen_image import build_qwen_image
from tests.three_branches import ThreeBranchPipeline
from vllm_cfg_plugin.pipelines import registry
from vllm_cfg_plugin.pipelines.base import generator_of

pytestmark = pytest.mark.distributed

RANKS = (1, 2, 3)
# seed -> (prompt, image's (width, height) or None, parameters); 4 has one branch, 2 and 3 two, the others three.
ASKED = {
    0: ("make it red", (32, 48), {"negative_prompt": "", "guidance_scale_2": 1.5, "height": 64, "width": 48}),
    1: ("a cat", (64, 32), {"negative_prompt": "ugly", "guidance_scale_2": 2.0, "num_inference_steps": 3}),
    2: ("a dog", (32, 32), {"negative_prompt": ""}),  # its image scale is 1
    3: ("a fox", None, {"negative_prompt": "", "guidance_scale_2": 2.0}),  # no image to be guided by
    4: ("a red apple", (48, 32), {"guidance_scale_2": 2.0}),
    5: ("x", (32, 32), {"negative_prompt": "", "guidance_scale_2": 3.0, "guidance_interval": [0.25, 0.8]}),
}
BRANCHES = {0: 3, 1: 3, 2: 2, 3: 2, 4: 1, 5: 3}
DEFAULTS = {"height": 32, "width": 32, "num_inference_steps": 5, "true_cfg_scale": 3.0}


def load(folder):
    return ThreeBranchPipeline.load(str(folder), dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_qwen_image(tmp_path_factory.mktemp("model") / "small", size="small")


@pytest.fixture(scope="module")
def requests(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FAMILIES, "QwenImagePipeline", "tests.three_branches:ThreeBranchPipeline")
        return {seed: _request(model, seed, *asked) for seed, asked in ASKED.items()}


def _request(model, seed, prompt, size, params):
    noise = torch.randint(256, (*size[::-1], 3), generator=torch.Generator().manual_seed(seed)) if size else None
    images = [] if noise is None else [Image.fromarray(noise.to(torch.uint8).numpy())]
    return make_request(model, prompt, images, seed=seed, **(DEFAULTS | params))


@pytest.fixture(scope="module")
def traces(model, requests, tmp_path_factory):
    """{ranks: [each rank's {script: {seed: latents after each step}}]}"""
    scripts = {f"alone-{seed}": [(0, request)] for seed, request in requests.items()}
    scripts["mixed"] = [(seed, request) for seed, request in requests.items()]
    folder = tmp_path_factory.mktemp("traces")
    return {ranks: run_ranks(model, ranks, scripts, folder, load=load) for ranks in RANKS}


@torch.inference_mode()
def serial_latents(pipeline, transformer, request):
    """The plain loop: each branch forwarded by itself, the formula written out; latents after each step."""
    latents, scheduler = pipeline.draw_noise(request, generator_of(request)), pipeline.make_noise_scheduler(request)
    image = pipeline.encode_images(request)[0]
    shape, image_shape = (
        (1, height // 16, width // 16)
        for height, width in ((request.height, request.width), (request.images[0].height, request.images[0].width))
    )
    texts = [pipeline.encode_prompt(prompt, max_sequence_length=1024)[0] for prompt in request.prompts]

    def predict(text, sequence, shapes):
        return transformer(
            hidden_states=sequence,
            encoder_hidden_states=text,
            timestep=(t / 1000)[None],
            img_shapes=[shapes],
            return_dict=False,
        )[0][:, : latents.shape[1]]

    history = []
    for step, t in enumerate(scheduler.timesteps):
        both = predict(texts[0], torch.cat([latents, image], dim=1), [shape, image_shape])
        noise = both
        if step in request.guidance.guided_steps(request.num_inference_steps):
            only_image = predict(texts[1], torch.cat([latents, image], dim=1), [shape, image_shape])
            nothing = predict(texts[1], latents, [shape])
            scale, image_scale = request.guidance.scale, request.guidance.scale_2
            noise = nothing + image_scale * (only_image - nothing) + scale * (both - only_image)
            noise = noise * (both.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
        history.append(latents)
    return history


def bitwise_equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_third_branch_needs_an_image_and_its_scale(requests):
    """The third branch is there where an image and its scale are."""
    assert {seed: len(request.prompts) for seed, request in requests.items()} == BRANCHES
    first = requests[0]
    assert first.prompts == ["make it red", "", ""]
    assert first.text_tokens[1] == first.text_tokens[2]


@torch.inference_mode()
def test_the_third_branch_sees_no_image(requests, model):
    pipeline, lengths = load(model), [12 + 6, 12 + 6, 12]
    branches = branches_of(pipeline, requests[0])
    assert [pipeline.pack_branches([branch])["hidden_states"].shape[1] for branch in branches] == lengths
    assert pipeline.pack_branches(branches)["hidden_states"].shape[1] == sum(lengths)


@pytest.mark.parametrize("ranks", RANKS)
def test_latents_are_bitwise_those_of_the_serial_loop(traces, requests, model, ranks):
    """Latents are bitwise those of the serial loop on every rank."""
    torch.set_num_threads(1)
    pipeline = load(model)
    for seed in (seed for seed, branches in BRANCHES.items() if branches == 3):
        expected = serial_latents(pipeline, pipeline.transformer, requests[seed])
        for rank, by_script in enumerate(traces[ranks]):
            for script in (f"alone-{seed}", "mixed"):
                assert bitwise_equal(by_script[script][seed], expected), f"request {seed}, {script}, rank {rank}"


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_bitwise_equal_latents(traces, ranks):
    for by_script in traces[ranks]:
        for script, by_seed in traces[1][0].items():
            for seed, trace in by_seed.items():
                assert bitwise_equal(trace, by_script[script][seed]), f"request {seed} depends on the ranks"


def test_latents_agree_with_diffusers_own_transformer(traces, requests, model):
    pipeline = load(model)
    transformer = QwenImageTransformer2DModel.from_pretrained(model / "transformer")
    for seed in (0, 1, 5):
        expected = serial_latents(pipeline, transformer, requests[seed])[-1]
        difference = (traces[3][0]["mixed"][seed][-1] - expected).abs().max().item()
        assert difference <= 1e-4, f"request {seed} differs by {difference}"


def test_every_branch_matters(traces, requests, model):
    """Else equality would show little: other scales give other latents."""
    pipeline = load(model)
    request = requests[0]
    for change in ({"scale": 5.0}, {"scale_2": 1.0}, {"scale_2": 3.0}):
        guidance = msgspec.structs.replace(request.guidance, **change)
        other = msgspec.structs.replace(request, guidance=guidance)
        latents = serial_latents(pipeline, pipeline.transformer, other)[-1]
        assert (latents - traces[1][0]["alone-0"][0][-1]).abs().max() > 0.01, change
