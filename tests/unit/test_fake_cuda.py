"""Every family on a GPU that computes nothing: from images to pixels devices fit, no step waits, kernels are known."""

from contextlib import contextmanager

import pytest
import torch

from tests.families import FAMILIES
from tests.toy_pipeline import InlineSideWork
from tests.unit.fake_cuda import DEVICE, fake_cuda, move_to_gpu, to_fake
from tests.unit.played_group import Played
from tests.unit.test_runner import join, plan
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.distributed.sequence_group import NO_GROUPS, SequenceGroups
from vllm_cfg_plugin.pipelines.base import PromptEmbeds
from vllm_cfg_plugin.pipelines.common.tensor_parallel import divide
from vllm_cfg_plugin.pipelines.offload import offload_layers, offloadable, weight_bytes
from vllm_cfg_plugin.pipelines.registry import pipeline_class
from vllm_cfg_plugin.worker.pace import CudaPace
from vllm_cfg_plugin.worker.runner import StepRunner

# What one rank of two asks of its GPU in a step of the family's cases (two blocks, two or three requests): kernels, and
# copies of timesteps and the like from pinned memory. Lower them when they fall.
STEADY = {
    "QwenImagePipeline": (96, 0),
    "QwenImageEditPipeline": (89, 0),
    "QwenImageEditPlusPipeline": (133, 0),
    "QwenImageLayeredPipeline": (85, 0),
    "ZImagePipeline": (150, 0),
    "WanPipeline (2.1)": (437, 1),
    "WanPipeline (2.2 14B)": (437, 1),
    "WanPipeline (2.2 5B)": (437, 1),
    "WanImageToVideoPipeline (2.1)": (495, 1),
    "WanImageToVideoPipeline (2.2 14B)": (441, 1),
    "WanImageToVideoPipeline (2.2 5B)": (544, 1),
    "FluxPipeline": (233, 1),
    "FluxPipeline, distilled": (232, 2),
    "StableDiffusion3Pipeline": (217, 1),
    "LongCatImagePipeline": (176, 0),
    "LongCatImageEditPipeline": (133, 0),
}


# One family of each.
OF_EVERY_TRANSFORMER = [
    next(family for family in FAMILIES if family.label == label)
    for label in (
        "QwenImagePipeline",
        "ZImagePipeline",
        "WanPipeline (2.2 14B)",
        "FluxPipeline",
        "StableDiffusion3Pipeline",
        "LongCatImagePipeline",
    )
]
MODULATED_BY_TEXTS = {"FluxPipeline", "StableDiffusion3Pipeline"}


@contextmanager
def rank_on_gpu(
    family, folder, move_transformer=lambda pipeline, transformer: move_to_gpu(transformer), groups=NO_GROUPS
):
    """(a rank that has taken the first step of the family's cases, its GPU)."""
    folder = family.build(folder)
    cls = pipeline_class(Checkpoint(str(folder)))
    pipeline = cls.load(str(folder), dtype=torch.bfloat16, device=torch.device("cpu"))
    requests = family.requests(folder)
    with torch.inference_mode():
        texts = {(r.seed, b): pipeline.encode_branch(r, b) for r in requests for b in range(len(r.prompts))}
    with fake_cuda() as gpu, torch.inference_mode():
        for name, component in pipeline.components.items():
            if name.startswith("transformer") and component is not None:
                move_transformer(pipeline, component)
            elif isinstance(component, torch.nn.Module):
                move_to_gpu(component)
        texts = {key: PromptEmbeds(*map(to_fake, embeds.tensors)) for key, embeds in texts.items()}
        # Some text encoders look at what they are given, which is not there.
        pipeline.encode_branch = lambda request, branch: texts[request.seed, branch]
        side, pace = InlineSideWork(0), CudaPace(DEVICE)
        side.keep = lambda id, steps, run: None  # makes bytes of tensors, beside the steps
        runner = StepRunner(pipeline, 0, 2, lambda row: torch.stack([row, row]), side, pace, groups)
        # Every other request has both branches here, as where the other rank has more to do.
        owners = [(0, 1) if i % 2 else (0, 0) for i, _ in enumerate(requests)]
        owners = [own[: len(request.prompts)] for own, request in zip(owners, requests, strict=True)]
        assert not runner.run(join(requests, owners)).failed
        yield runner, gpu


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label)
def test_a_steady_step_never_waits_for_the_gpu(family, tmp_path):
    with rank_on_gpu(family, tmp_path / "model") as (runner, gpu):
        for step in (1, 2):
            assert not runner.run(plan(step)).failed
        counts = gpu.start_counting()
        assert not runner.run(plan(3)).failed
        gpu.start_counting()
        for state in runner.states.values():
            condition = runner.beside._condition(state.request) if runner.pipeline.decode_sees_images else []
            pixels = runner.pipeline.decode(state.latents, state.request, condition)
            assert (pixels.device.type, pixels.dtype) == ("cpu", torch.uint8)
    assert counts.syncs == {}
    assert sum(counts.downloads.values()) == 1, "the flags of failures"
    assert (counts.launches.total(), counts.uploads.total()) == STEADY[family.label], counts.launches


def offload_all_layers(pipeline, transformer):
    layers = offloadable(transformer, pipeline.layer_lists)
    offload_layers(transformer, DEVICE, sum(weight_bytes(layer) for layer, _ in layers), pipeline.layer_lists)


@pytest.mark.parametrize("family", OF_EVERY_TRANSFORMER, ids=lambda family: family.label)
def test_layers_in_host_memory_come_in_turn_and_nothing_waits_for_them(family, tmp_path):
    with rank_on_gpu(family, tmp_path / "model", offload_all_layers) as (runner, gpu):
        assert not runner.run(plan(1)).failed
        counts = gpu.start_counting()
        assert not runner.run(plan(2)).failed
        transformer = runner.pipeline.transformer
        layers = len(offloadable(transformer, runner.pipeline.layer_lists))
    assert counts.syncs == {}
    sent = sum(count for line, count in counts.uploads.items() if "offload.py" in line)
    # Those of all layers; where the text is part of what modulates, that comes apart, in every step.
    assert sent == layers * (2 if family.class_name in MODULATED_BY_TEXTS else 1), counts.uploads


@pytest.mark.parametrize("family", OF_EVERY_TRANSFORMER, ids=lambda family: family.label)
def test_processes_that_share_weights_wait_for_nothing_else_of_the_gpu(family, tmp_path):
    group = Played(0, 2)

    def move_part(pipeline, transformer):
        divide(transformer, transformer.tensor_plan, group)
        move_to_gpu(transformer)

    with rank_on_gpu(family, tmp_path / "model", move_part, SequenceGroups(group)) as (runner, gpu):
        assert not runner.run(plan(1)).failed
        counts = gpu.start_counting()
        assert not runner.run(plan(2)).failed
    assert counts.syncs == {}
