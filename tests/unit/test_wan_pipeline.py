"""Our Wan pipelines against diffusers' own, called directly and through the engine's contract."""

import json
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests import contract
from tests.contract import branches_of
from tests.model_builders.wan import LAYOUTS, build_wan
from tests.toy_pipeline import InlineSideWork
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.distributed import cfg_parallel
from vllm_cfg_plugin.engine.plan import Admission, Assign, Encode, StepPlan
from vllm_cfg_plugin.errors import ConfigurationError, InvalidRequestError
from vllm_cfg_plugin.pipelines import registry
from vllm_cfg_plugin.pipelines.wan import WanPipeline
from vllm_cfg_plugin.worker.runner import StepRunner

CPU = torch.device("cpu")
SIZE = {"height": 64, "width": 96, "num_frames": 9}
STEPS = 6
OPTIONS = [{}, {"negative_prompt": "ugly", "num_frames": 5}, {"guidance_scale": 1.0, "num_frames": 13}]


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8))


class Model:
    """One checkpoint, in diffusers' pipeline and in ours."""

    def __init__(self, folder, layout):
        self.folder = str(build_wan(folder, layout))
        self.layout = layout
        checkpoint = Checkpoint(self.folder)
        self.info = registry.describe(checkpoint)
        self.reference = getattr(diffusers, checkpoint.class_name()).from_pretrained(self.folder)
        self.reference.set_progress_bar_config(disable=True)
        self.ours = registry.pipeline_class(checkpoint).load(self.folder, dtype=torch.float32, device=CPU)

    @property
    def images(self):
        """As many as the model takes."""
        return [picture(seed) for seed in range(self.info.max_images)]

    def options(self, images=None, **options):
        """Arguments of diffusers' `__call__`."""
        images = self.images if images is None else images
        given = dict(zip(("image", "last_image"), images, strict=False))
        scales = {"guidance_scale_2": 2.0} if "guidance_scale_2" in self.info.options else {}
        return {"prompt": "a red apple", "guidance_scale": 4.0, "num_inference_steps": STEPS} | scales | given | options

    def call(self, pipeline, seed=42, **options):
        options = {"output_type": "latent"} | SIZE | self.options(**options)
        return pipeline(**options, generator=torch.Generator().manual_seed(seed), return_dict=False)[0]

    def request(self, seed=42, **options):
        options = SIZE | self.options(**options)
        images = [options.pop(name) for name in ("image", "last_image") if name in options]
        return contract.make_request(self.folder, options.pop("prompt"), images, seed=seed, **options)

    def condition_of_decode(self, request):
        return self.ours.encode_images(request) if self.ours.decode_sees_images else []


@pytest.fixture(scope="module")
def get_model(tmp_path_factory):
    models = {}

    def get(layout):
        if layout not in models:
            models[layout] = Model(tmp_path_factory.mktemp(layout), layout)
        return models[layout]

    return get


@pytest.fixture(params=LAYOUTS)
def model(request, get_model):
    return get_model(request.param)


@pytest.mark.parametrize("options", OPTIONS)
def test_latents_like_diffusers_called_and_in_the_engine(model, options):
    """Latents like diffusers and bitwise alike called and in the engine."""
    expected, called = (model.call(pipeline, **options) for pipeline in (model.reference, model.ours))
    assert expected.std() > 0.5
    torch.testing.assert_close(called, expected, rtol=0, atol=1e-4)
    request = model.request(**options)
    latents = contract.generate(model.ours, request)
    assert torch.equal(model.ours.final_latents(latents, model.condition_of_decode(request)), called)


def test_frames_like_diffusers(model):
    request = model.request()
    pixels = model.ours.decode(contract.generate(model.ours, request), request, model.condition_of_decode(request))
    assert (pixels.dtype, pixels.device) == (torch.uint8, CPU)
    assert pixels.shape == (9, 64, 96, 3)
    expected, called = (
        (model.call(pipeline, output_type="np")[0] * 255).round() for pipeline in (model.reference, model.ours)
    )
    contract.assert_same_pixels(pixels, expected)
    np.testing.assert_array_equal(pixels.numpy(), called)


def test_a_branch_depends_on_nothing_else_in_its_packed_forward(model):
    """Bitwise, among videos of other sizes, frames, texts, images and steps (all of the first expert)."""
    sizes = [(64, 96, 9), (32, 64, 1), (96, 32, 5), (64, 96, 9), (64, 64, 13)]
    requests = [
        model.request(
            images=model.images[: 1 if frames == 1 else None],
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=40,
            seed=i,
            prompt="an apple " * (i + 1),
        )
        for i, (height, width, frames) in enumerate(sizes)
    ]
    contract.assert_packed_is_alone(model.ours, requests)


def test_the_description_of_a_checkpoint(get_model):
    described = {layout: get_model(layout).info for layout in LAYOUTS}
    assert {layout: info.task for layout, info in described.items()} == {
        layout: "image-to-video" if layout.endswith("-image") else "text-to-video" for layout in LAYOUTS
    }
    assert {layout: (info.pixels_per_token, info.fps) for layout, info in described.items()} == {
        layout: (32, 24) if layout.startswith("5b") else (16, 16) for layout in LAYOUTS
    }
    experts = [layout for layout, info in described.items() if "guidance_scale_2" in info.options]
    assert experts == ["2.2", "2.2-image"]
    assert [(info.min_images, info.max_images) for info in described.values()] == [(0, 0)] * 3 + [
        (1, 1),
        (1, 2),
        (1, 1),
    ]
    request = get_model("2.1-image").request()
    assert request.text_tokens == [512 + 5, 512 + 5]  # 2 x 2 patches and one more
    assert request.image_tokens == 3 * 4 * 6
    assert get_model("5b").request().image_tokens == 3 * 2 * 3


def test_an_images_shape_decides_the_videos_where_nobody_says(get_model):
    model = get_model("5b-image")
    request = contract.make_request(model.folder, "a cat", [Image.new("RGB", (300, 700))], num_inference_steps=2)
    assert (request.height, request.width) == (96, 32)  # of 64 x 64 pixels


@pytest.mark.parametrize("shape", [(1, 300), (300, 1)])
def test_an_image_whose_shape_makes_too_long_a_video_is_named(get_model, tmp_path, shape):
    folder = shutil.copytree(get_model("5b-image").folder, tmp_path / "model")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_max_seq_len": 4}))  # 128 pixels
    images = [Image.new("RGB", shape)]
    said = f'image="{shape[0]}x{shape[1]}" is not valid: it must be at most about 4 times as long on one side as on '
    said += "the other, "
    with pytest.raises(InvalidRequestError, match=re.escape(said + "or sent with a size of the video")):
        contract.make_request(folder, "a cat", images, num_inference_steps=2)
    request = contract.make_request(folder, "a cat", images, num_inference_steps=2, height=64, width=64)
    assert (request.height, request.width) == (64, 64)


def test_experts_take_turns(get_model):
    model = get_model("2.2")
    request = model.request()
    groups, scales = [], []
    for step, timestep in enumerate(model.ours.make_noise_scheduler(request).timesteps):
        branch = branches_of(model.ours, request, step)[0]
        groups.append(model.ours.forward_group(branch))
        scales.append(model.ours.guidance_scale_at(request, timestep))
    assert groups == ["transformer"] * 2 + ["transformer_2"] * 4  # 875 lies between 937 and 857
    assert scales == [4.0] * 2 + [2.0] * 4


def test_requests_on_both_sides_of_the_boundary_share_a_step(get_model):
    """One packed forward for each expert that has branches; the latents are those of each request alone."""
    model = get_model("2.2")
    requests = [model.request(num_inference_steps=steps, seed=steps) for steps in (6, 2)]
    alone = [contract.generate(model.ours, request) for request in requests]
    runner = StepRunner(model.ours, 0, 1, lambda row: row.unsqueeze(0), InlineSideWork(0))
    counts = {"transformer": [], "transformer_2": []}
    hooks = [
        getattr(model.ours, name).register_forward_hook(
            lambda *args, count=count: count.append(len(args[2]["timestep"])), with_kwargs=True
        )
        for name, count in counts.items()
    ]
    first = StepPlan(
        0,
        [],
        [Admission(id, request) for id, request in enumerate(requests)],
        [Encode(id, branch, 0) for id in (0, 1) for branch in (0, 1)],
        [Assign(id, (0, 0)) for id in (0, 1)],
        True,
        [],
    )
    assert not runner.run(first).failed
    states = list(runner.states.values())
    for step in range(1, 6):
        assert not runner.run(StepPlan(step, [], [], [], [], True, [])).failed
    for hook in hooks:
        hook.remove()
    assert counts == {"transformer": [4, 2], "transformer_2": [2, 2, 2, 2, 2]}
    assert all(torch.equal(state.latents, own) for state, own in zip(states, alone, strict=True))


@torch.inference_mode()
def test_each_expert_has_its_own_weights(get_model):
    model = get_model("2.2")
    arguments = model.ours.pack_branches(branches_of(model.ours, model.request(), 5)[:1])
    assert arguments["current_model"] is model.ours.transformer_2
    swapped = model.ours.predict_noise(**arguments | {"current_model": model.ours.transformer})
    assert not torch.equal(model.ours.predict_noise(**arguments), swapped)


class HalfNoise(WanPipeline):
    def predict_noise(self, current_model=None, **kwargs):
        return 0.5 * (current_model or self.transformer)(**kwargs)[0]


class PositiveOnly(WanPipeline):
    def combine_cfg_noise(self, noise_pred, neg_noise_pred, true_cfg_scale, cfg_normalize=False):
        return noise_pred


@pytest.mark.parametrize("override", [HalfNoise, PositiveOnly])
def test_an_override_acts_in_the_direct_call_and_in_the_engine(get_model, override):
    model = get_model("2.2")
    components = model.ours.components
    pipeline = override(**components, boundary_ratio=model.ours.config.boundary_ratio)
    called = model.call(pipeline)
    assert (called - model.call(model.ours)).abs().max() > 1e-2
    assert torch.equal(contract.generate(pipeline, model.request()), called)


def test_sizes_are_rounded_like_diffusers_and_it_is_said(get_model, caplog):
    model = get_model("5b")
    cfg_parallel.log_once.cache_clear()
    odd = {"height": 80, "width": 112, "num_frames": 8}
    expected = model.call(model.reference, **odd)
    torch.testing.assert_close(model.call(model.ours, **odd), expected, rtol=0, atol=1e-5)
    assert "(80, 112, 8) is rounded to (64, 96, 9)" in caplog.text


def test_several_videos_per_prompt(get_model):
    model = get_model("2.1-image")
    together = model.call(model.ours, prompt=["a cat", "a dog"], num_videos_per_prompt=2)
    assert together.shape[0] == 4
    assert torch.isfinite(together).all()


@pytest.mark.parametrize("wrong", [{"transformer_2": [None, None]}, {"boundary_ratio": "0.9"}])
def test_an_index_without_second_expert_or_boundary_is_refused(tmp_path, wrong):
    folder = build_wan(tmp_path / "model", "2.2")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | wrong))
    with pytest.raises(ConfigurationError, match=rf"model_index\.json: {next(iter(wrong))}"):
        registry.describe(Checkpoint(str(folder)))


def test_a_model_without_its_second_expert_is_refused(get_model, tmp_path):
    folder = build_wan(tmp_path / "model", "2.2")
    (folder / "transformer_2/config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"transformer_2/config\.json is missing"):
        registry.describe(Checkpoint(str(folder)))
    components = get_model("2.2").ours.components | {"transformer_2": None}
    with pytest.raises(ConfigurationError, match=r"transformer_2 is missing with boundary_ratio=0\.5"):
        WanPipeline(**components, boundary_ratio=0.5)(prompt="a cat", height=32, width=32, num_frames=1)


@torch.inference_mode()
def test_tokens_are_counted_as_they_are(model):
    reads_limit = model.ours.transformer.config.image_dim is None  # diffusers counts on 512 beside an image's
    assert ("max_sequence_length" in model.info.options) == reads_limit
    request = model.request()
    [branch, _] = branches_of(model.ours, request)
    packed = model.ours.pack_branches([branch])
    latents, patch = packed["hidden_states"][0], model.ours.transformer.patch_embedding.kernel_size
    assert latents[0, 0].numel() // np.prod(patch) == request.image_tokens
    embeds = packed["encoder_hidden_states_image"]
    images = 0 if embeds is None else embeds[0].shape[0] * embeds[0].shape[1]
    assert branch.embeds.tokens.shape[0] + images == request.text_tokens[0]
    assert request.condition_tokens == 0


def test_bfloat16_like_diffusers(get_model):
    """Predictions have the dtype that is exchanged; the VAE stays in float32, as in the checkpoints' examples."""
    model = get_model("2.2-image")
    ours = type(model.ours).load(model.folder, dtype=torch.bfloat16, device=CPU)
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    reference = type(model.reference).from_pretrained(model.folder, dtype=dtypes)
    reference.set_progress_bar_config(disable=True)
    assert (ours.prediction_like.dtype, ours.vae.dtype) == (torch.bfloat16, torch.float32)
    assert ours.transformer.scale_shift_table.dtype == torch.float32
    arguments = ours.pack_branches(branches_of(model.ours, model.request())[:1])
    texts = [text.bfloat16() for text in arguments.pop("encoder_hidden_states")]
    assert ours.predict_noise(**arguments, encoder_hidden_states=texts).dtype == torch.bfloat16
    torch.testing.assert_close(model.call(ours), model.call(reference), rtol=0, atol=0.1)


def test_frames_and_images_that_do_not_fit_are_refused(get_model):
    with pytest.raises(InvalidRequestError, match="num_frames=8"):
        get_model("2.1").request(num_frames=8)
    with pytest.raises(InvalidRequestError, match="image"):
        get_model("2.1").request(images=[picture(0)])
    with pytest.raises(InvalidRequestError, match="1 image for this model"):
        get_model("2.1-image").request(images=[])
    with pytest.raises(InvalidRequestError, match="num_frames=1 is not valid: it must be at least 2"):
        get_model("2.2-image").request(num_frames=1)
    assert get_model("2.2-image").request(images=[picture(0)], num_frames=1).num_frames == 1
    with pytest.raises(InvalidRequestError, match="guidance_scale_2"):
        get_model("2.1").request(guidance_scale_2=3.0)
