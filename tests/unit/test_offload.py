"""Layers whose weights come from host memory: the same bits, and two layers on the device at a time."""

import pytest
import torch
from torch import nn

from tests.contract import generate, make_request
from tests.families import FAMILIES, load
from tests.toy_pipeline import ToyPipeline
from tests.unit.test_quantized import forward
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.distributed.sequence_group import ALONE
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.components import load_transformer
from vllm_cfg_plugin.pipelines.offload import in_turn, offload_layers, offloadable, weight_bytes
from vllm_cfg_plugin.pipelines.quantized import QuantizedLinear
from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline
from vllm_cfg_plugin.worker import calibration

CPU, META = torch.device("cpu"), torch.device("meta")
LISTS = {"blocks": ("modulation",)}
SIDE = 32
WEIGHT_BYTES = SIDE * SIDE * 4
LAYERS = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(SIDE, SIDE)
        self.mlp = nn.Sequential(nn.LayerNorm(SIDE), nn.Linear(SIDE, SIDE))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedder = nn.Linear(SIDE, SIDE)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))


def offloaded_model(layers, device=CPU):
    """A model and copies of its layers' weights, so many layers in host memory."""
    model = Model()
    weights = [block.mlp[1].weight.detach().clone() for block in model.blocks]
    assert offload_layers(model, device, 2 * layers * WEIGHT_BYTES, LISTS) == 2 * layers * WEIGHT_BYTES
    return model, weights


def test_so_many_layers_are_in_host_memory_as_must_spread_over_all():
    model, _ = offloaded_model(3, META)
    assert [number for number, block in enumerate(model.blocks) if hasattr(block, "in_host")] == [2, 5, 7]
    for number, block in enumerate(model.blocks):
        weights = {block.modulation.weight.device, block.mlp[1].weight.device}
        assert weights == {CPU if number in (2, 5, 7) else META}
        assert {block.mlp[0].weight.device, block.mlp[1].bias.device} == {META}
    assert model.embedder.weight.device == META
    assert offload_layers(Model(), META, 10**9, LISTS) == 2 * LAYERS * WEIGHT_BYTES, "no more than there are"


def test_two_layers_are_on_the_device_at_a_time_and_parts_apart():
    model, weights = offloaded_model(LAYERS)
    places = set()
    for block, weight in zip(in_turn(model.blocks), weights, strict=True):
        assert torch.equal(block.mlp[1].weight, weight)
        assert block.mlp[1].bias is not None
        places.add(block.mlp[1].weight.data_ptr())
    assert len(places) == 2
    in_host = {block.mlp[1].weight.data_ptr() for block in model.blocks}
    assert not places & in_host, "a forward works on copies"
    block = next(in_turn(model.blocks, "modulation"))
    assert block.mlp[1].weight.data_ptr() in in_host
    assert block.modulation.weight.data_ptr() != model.blocks[0].modulation.weight.data_ptr()


def test_two_forwards_at_once_do_not_meet():
    model, weights = offloaded_model(LAYERS)
    first, second = in_turn(model.blocks), in_turn(model.blocks)
    ahead = [next(first) for _ in range(3)][-1]
    for weight in weights:
        assert torch.equal(next(second).mlp[1].weight, weight)
        assert torch.equal(ahead.mlp[1].weight, weights[2])


def test_a_weight_that_is_changed_in_place_acts():
    model, _ = offloaded_model(LAYERS)
    with torch.no_grad():
        model.blocks[4].mlp[1].weight.fill_(3)
    for number, block in enumerate(in_turn(model.blocks)):
        assert bool((block.mlp[1].weight == 3).all()) == (number == 4)


def transformers_of(pipeline):
    names = ("transformer", "transformer_2")
    return [getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label)
def test_offloaded_layers_give_the_same_bits(family, tmp_path):
    folder = family.build(tmp_path / "model")
    pipeline, requests = load(folder), family.requests(folder)
    with torch.inference_mode():
        resident = forward(pipeline, requests)
        pipeline.forget_derived()
        for transformer in transformers_of(pipeline):
            weights = sum(weight_bytes(layer) for layer, _ in offloadable(transformer, pipeline.layer_lists))
            assert offload_layers(transformer, CPU, weights, pipeline.layer_lists) >= weights > 0
        offloaded = forward(pipeline, requests)
    for one, other in zip(resident, offloaded, strict=True):
        assert torch.equal(one, other)


def test_it_is_loaded_so_and_quantized_too(qwen_image_folders):
    folder = qwen_image_folders["tiny"]
    request = make_request(folder, "a red apple", seed=1)
    for options in ({}, {"quantization": "int8"}):
        options |= {"dtype": torch.float32, "device": CPU}
        resident = QwenImagePipeline.load(str(folder), **options)
        offloaded = QwenImagePipeline.load(str(folder), **options, offloaded_bytes=1)
        hosts = [layer.in_host for layer in offloaded.transformer.transformer_blocks if hasattr(layer, "in_host")]
        assert len(hosts) == 1
        if "quantization" in options:
            assert isinstance(offloaded.transformer.transformer_blocks[0].attn.to_q, QuantizedLinear)
        with torch.inference_mode():
            assert torch.equal(*(generate(pipeline, request) for pipeline in (resident, offloaded)))


def test_what_forwards_no_layers_in_turn_is_refused(qwen_image_folders):
    checkpoint = Checkpoint(str(qwen_image_folders["tiny"]))
    with pytest.raises(ConfigurationError, match=r"cpu_offload_gb is not valid .* ToyPipeline .* leave it out"):
        load_transformer(checkpoint, ToyPipeline, "transformer", torch.float32, CPU, None, offloaded_bytes=1)


def test_what_work_costs_is_kept_apart_from_that_of_other_places(qwen_image_folders):
    folder = str(qwen_image_folders["tiny"])
    keys = {
        calibration._key(
            QwenImagePipeline.load(folder, dtype=torch.float32, device=CPU, offloaded_bytes=size),
            Checkpoint(folder),
            *(1, ALONE, "all"),
        )
        for size in (0, 1, 2**30)
    }
    assert len(keys) == 3
