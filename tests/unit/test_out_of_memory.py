"""Where a rank's memory ends: packs are split once and not tried again, decodes are repeated in tiles."""

import pytest
import torch

from tests.contract import make_request
from tests.families import FAMILIES, load
from tests.toy_pipeline import ToyPipeline, toy_request
from tests.unit.test_runner import join, make_runner
from vllm_cfg_plugin.engine.plan import Decode, Preview, StepPlan
from vllm_cfg_plugin.pipelines.base import BranchInput, PromptEmbeds, generator_of
from vllm_cfg_plugin.worker.out_of_memory import PackedForwards, decode


def branches(pipeline, *image_tokens):
    requests = [toy_request(image_tokens=tokens, seed=tokens) for tokens in image_tokens]
    text = PromptEmbeds(torch.ones(1, 3))
    return [BranchInput(r, pipeline.draw_noise(r, generator_of(r)), text, torch.tensor(1.0)) for r in requests]


class SmallMemory:
    """A pipeline whose forwards have room for so many tokens; counts what was tried."""

    def __init__(self, room):
        self.tried = []
        self.pipeline = ToyPipeline()
        self.pipeline.transformer.fail = self._fail
        self.forwards = PackedForwards(self.pipeline)
        self._room = room

    def _fail(self, sequences):
        self.tried.append([branch.request.image_tokens for branch in sequences])
        if sum(branch.tokens for branch in sequences) > self._room:
            raise torch.OutOfMemoryError("too many")

    def predict(self, *image_tokens):
        self.tried.clear()
        inputs = branches(self.pipeline, *image_tokens)
        outcomes = self.forwards.predict(inputs)
        assert len(outcomes) == len(inputs)
        return outcomes


def test_a_pack_without_room_is_split_and_from_then_on_split_beforehand():
    memory = SmallMemory(room=50)
    outcomes = memory.predict(20, 21, 22, 23)
    assert memory.tried == [[20, 21, 22, 23], [20, 21], [22, 23]]
    assert memory.forwards.too_many_tokens == 90
    again = memory.predict(20, 21, 22, 23)
    assert memory.tried == [[20, 21], [22, 23]], "no forward fails a second time"
    assert all(torch.equal(one, other) for one, other in zip(outcomes, again, strict=True))
    memory.predict(5, 5, 5)
    assert memory.tried == [[5, 5, 5]], "what fits is not split"


def test_the_smallest_pack_without_room_counts():
    memory = SmallMemory(room=15)
    memory.predict(10, 10, 10, 10)
    assert memory.forwards.too_many_tokens == 22
    memory.predict(10, 10, 10, 10)
    assert memory.tried == [[10], [10], [10], [10]]
    memory.predict(6, 6, 6, 6, 6)
    assert all(sum(tokens) + len(tokens) < 22 for tokens in memory.tried)


def test_another_failure_than_of_memory_is_not_remembered():
    memory = SmallMemory(room=10**6)
    memory.pipeline.transformer.fail = lambda sequences: (_ for _ in ()).throw(ValueError("out of luck"))
    assert all(isinstance(outcome, ValueError) for outcome in memory.predict(1, 2, 3))
    assert memory.forwards.too_many_tokens is None


def test_what_has_no_room_alone_fails_alone():
    first, second, third = SmallMemory(room=10).predict(5, 40, 6)
    assert isinstance(second, torch.OutOfMemoryError)
    assert (first.shape, third.shape) == ((1, 5, 4), (1, 6, 4))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label)
def test_a_decode_without_room_is_repeated_in_tiles(family, tmp_path, monkeypatch):
    pipeline, request = load(family.build(tmp_path / "m")), family.requests(tmp_path / "m")[0]
    if getattr(pipeline.vae, "tile_latent_min_size", 2) < 2:
        pytest.skip("this tiny VAE's own tiles are too small for diffusers' code")
    with torch.inference_mode():
        latents = pipeline.draw_noise(request, generator_of(request))
        condition = pipeline.encode_images(request) if request.images else []
        whole = decode(pipeline, latents, request, condition)
        vae_decode = type(pipeline.vae).decode

        def fail_untiled(self, *args, **kwargs):
            if not self.use_tiling:
                raise torch.OutOfMemoryError("too large")
            return vae_decode(self, *args, **kwargs)

        monkeypatch.setattr(type(pipeline.vae), "decode", fail_untiled)
        tiled = decode(pipeline, latents, request, condition)
        assert tiled.shape == whole.shape
        monkeypatch.undo()
        assert torch.equal(decode(pipeline, latents, request, condition), whole), "the next one is whole again"


def test_tiles_are_smaller_than_the_image_and_change_little(qwen_image_folders):
    from vllm_cfg_plugin.checkpoint import Checkpoint
    from vllm_cfg_plugin.pipelines.registry import pipeline_class

    folder = qwen_image_folders["tiny"]
    ours = pipeline_class(Checkpoint(str(folder))).load(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    request = make_request(folder, "a cat", seed=1, height=512, width=512)
    with torch.inference_mode():
        latents = ours.draw_noise(request, generator_of(request))
        whole, tiled = ours.decode(latents, request), ours.tiled().decode(latents, request)
    difference = (whole.float() - tiled.float()).abs()
    assert difference.max() > 0, "else there was one tile"
    assert difference.mean() < 4


def test_what_is_known_to_have_no_room_is_tiled_at_once(qwen_image_folders, monkeypatch):
    ours = load(qwen_image_folders["tiny"])
    request = make_request(qwen_image_folders["tiny"], "a cat", seed=1, height=512, width=512)
    with torch.inference_mode():
        latents = ours.draw_noise(request, generator_of(request))
        tiled = ours.tiled().decode(latents, request)
        vae_decode = type(ours.vae).decode

        def only_tiled(self, *args, **kwargs):
            assert self.use_tiling
            return vae_decode(self, *args, **kwargs)

        monkeypatch.setattr(type(ours.vae), "decode", only_tiled)
        assert torch.equal(decode(ours, latents, request, (), is_tiled=True), tiled)


@pytest.mark.parametrize("is_tiled", [True, False])
def test_plans_say_what_is_decoded_in_tiles(is_tiled):
    pipeline, asked = ToyPipeline(), []
    pipeline.tiled = lambda: asked.append(1)  # it has no such VAE
    runner = make_runner(pipeline, 0, 1)
    steps = toy_request().num_inference_steps
    runner.run(join([toy_request()], [(0,)]))
    for step in range(1, steps):
        previews = [Preview(0, 0, is_tiled=is_tiled)] if step == 1 else []
        decodes = [Decode(0, 0, is_tiled=is_tiled)] if step == steps - 1 else []
        runner.run(StepPlan(step, [], [], [], [], True, decodes, previews=previews))
    assert len(runner.side.take()) > 1
    assert len(asked) == 2 * is_tiled


def test_without_a_vae_of_tiles_a_decode_fails_as_it_did(monkeypatch):
    pipeline = ToyPipeline()
    monkeypatch.setattr(pipeline, "decode", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("too large")))
    assert pipeline.tiled() is None
    with pytest.raises(torch.OutOfMemoryError):
        decode(pipeline, torch.zeros(1), toy_request(), ())
