"""Requests with adapters of every family: diffusers' own latents, and nothing to their neighbours."""

from functools import partial

import pytest
import torch
from msgspec.structs import replace

from tests.adapters import adapt_reference, make_adapter
from tests.contract import make_request
from tests.families import FAMILIES, SEED, STEPS, call, load
from tests.toy_pipeline import InlineSideWork
from vllm_cfg_plugin.engine.plan import Admission, Assign, Encode, StepPlan
from vllm_cfg_plugin.pipelines.adapter_files import find_adapter
from vllm_cfg_plugin.pipelines.offload import offload_layers
from vllm_cfg_plugin.pipelines.quantized import quantize_layers
from vllm_cfg_plugin.worker.adapters import AdapterLimits
from vllm_cfg_plugin.worker.runner import StepRunner

# Both on every layer that can be adapted.
SCALES = {"first": 0.8, "second": -1.2}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label)
def test_like_diffusers_and_beside_others(family, tmp_path):
    folder = family.build(tmp_path / "model")
    ours = load(folder)
    files = [make_adapter(tmp_path / f"{name}.safetensors", ours.transformer, len(name)) for name in SCALES]
    loras = [
        replace(find_adapter(name, str(file)), scale=scale)
        for (name, scale), file in zip(SCALES.items(), files, strict=True)
    ]
    plain = family.requests(folder)
    both = [replace(request, lora=loras) for request in plain]
    one = [replace(request, lora=loras[:1]) for request in plain]
    together = final_latents(ours, [*plain, *both, *one])
    for position, request in ((0, plain[0]), (len(plain), both[0])):
        assert torch.equal(together[position], final_latents(ours, [request])[0])
    reference = family.reference(folder)
    adapt_reference(getattr(reference, "pipeline", reference), [*zip(files, SCALES.values(), strict=True)])
    for i, (case, request) in enumerate(zip(family.cases, both, strict=True)):
        own = partial(family.to_reference, ours, request=request)
        latents, unadapted = own(together[len(plain) + i]), own(together[i])
        assert family.difference(latents, call(reference, case, SEED + i)) <= family.tolerance
        assert family.difference(latents, unadapted) > 0.01


def test_layers_that_are_quantized_or_whose_weights_stay_in_host_memory_are_adapted_too(qwen_image_folders, tmp_path):
    folder = qwen_image_folders["tiny"]
    ours, cpu = load(folder), torch.device("cpu")
    lora = find_adapter("pixel", str(make_adapter(tmp_path / "a.safetensors", ours.transformer, layers="img")))
    plain = make_request(folder, "a red apple", seed=1, height=64, width=64, num_inference_steps=STEPS)
    requests = [plain, replace(plain, lora=[lora])]
    before = final_latents(ours, requests)
    offload_layers(ours.transformer, cpu, 10**9, ours.layer_lists)
    assert all(map(torch.equal, final_latents(ours, requests), before))
    ours = load(folder)
    quantize_layers(ours.transformer, "int8", cpu)
    quantized, changed = final_latents(ours, requests), before[1] - before[0]
    assert (quantized[1] - quantized[0] - changed).norm() < 0.1 * changed.norm()


@torch.inference_mode()
def final_latents(pipeline, requests):
    """What one rank makes of requests that run together."""
    limits = AdapterLimits(rank=16, on_host=4, on_device=4)
    runner = StepRunner(pipeline, 0, 1, lambda row: row.unsqueeze(0), InlineSideWork(0), limits=limits)
    branches = [range(len(request.prompts)) for request in requests]
    first = StepPlan(
        0,
        [],
        [Admission(id, request) for id, request in enumerate(requests)],
        [Encode(id, branch, 0) for id, own in enumerate(branches) for branch in own],
        [Assign(id, (0,) * len(own)) for id, own in enumerate(branches)],
        True,
        [],
    )
    reports = [runner.run(first)]
    states = list(runner.states.values())
    reports += [runner.run(StepPlan(step, [], [], [], [], True, [])) for step in range(1, STEPS)]
    assert not [report.failed for report in reports if report.failed]
    return [state.latents for state in states]
