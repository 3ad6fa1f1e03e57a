"""Weights of one byte: every family's packed forward stays right, and a row's result depends on the row alone."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.contract import generate, make_request
from tests.families import FAMILIES, load
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.config import QUANTIZATIONS, EngineSettings
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.memory.sizing import model_memory
from vllm_cfg_plugin.pipelines.base import BranchInput, generator_of
from vllm_cfg_plugin.pipelines.common.linear import linear
from vllm_cfg_plugin.pipelines.quantized import METHODS, QuantizedLinear, layers_of, quantize_layers
from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline
from vllm_cfg_plugin.pipelines.registry import pipeline_class

CPU = torch.device("cpu")
EMOJI = Path(__file__).parents[2] / "examples/models/emoji"
# dB, of the bundled model's final latents against those of its own weights; docs/memory.md has what was measured.
LEAST_PSNR = {"int8": 45, "fp8": 34}


@pytest.mark.parametrize("method", METHODS)
def test_weights_take_one_byte_and_stay_close(method):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 96), torch.randn(32, 64)
    linear.weight.data[7] = 0
    quantized = QuantizedLinear.of(linear, method, CPU)
    assert quantized.weight.nbytes == linear.weight.numel()
    exact, close = linear(x), quantized(x)
    assert (exact - close).norm() / exact.norm() < {"int8": 0.01, "fp8": 0.04}[method]
    assert torch.equal(close[:, 7], exact[:, 7]), "a channel of zeros stays one"


@pytest.mark.parametrize("method", METHODS)
def test_a_row_depends_on_itself_alone(method):
    torch.manual_seed(0)
    quantized, x = QuantizedLinear.of(torch.nn.Linear(128, 256), method, CPU), torch.randn(80, 128)
    together = quantized(x)
    for first, rows in ((0, 16), (16, 48), (3, 77)):
        assert torch.equal(quantized(x[first : first + rows]), together[first : first + rows])


def forward(pipeline, requests):
    branches = [
        BranchInput(
            request,
            pipeline.draw_noise(request, generator_of(request)),
            pipeline.encode_branch(request, 0),
            pipeline.make_noise_scheduler(request).timesteps[0],
            condition=pipeline.encode_images(request) if request.images else [],
        )
        for request in requests
    ]
    return pipeline.unpack_predictions(pipeline.predict_noise(**pipeline.pack_branches(branches)), branches)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label)
def test_packed_forwards_of_every_family_take_quantized_layers(family, tmp_path):
    folder = family.build(tmp_path / "model")
    pipeline, requests = load(folder), family.requests(folder)
    with torch.inference_mode():
        exact = forward(pipeline, requests)
        for name in ("transformer", "transformer_2"):
            if getattr(pipeline, name, None) is not None:
                quantize_layers(getattr(pipeline, name), "int8", CPU)
        pipeline.forget_derived()
        packed = forward(pipeline, requests)
        alone = [forward(pipeline, [request])[0] for request in requests]
    for close, other, one in zip(packed, exact, alone, strict=True):
        assert 0 < (close - other).norm() / other.norm() < 0.02
        assert torch.equal(close, one)


@pytest.mark.parametrize("method", METHODS)
def test_loaded_quantized_the_layers_are_and_nothing_else(qwen_image_folders, method):
    folder = str(qwen_image_folders["tiny"])
    pipeline = QwenImagePipeline.load(folder, dtype=torch.float32, device=CPU, quantization=method)
    transformer = pipeline.transformer
    inside = [module for layer in layers_of(transformer) for module in layer.modules()]
    assert {module.weight.dtype for module in inside if isinstance(module, QuantizedLinear)} == {METHODS[method][0]}
    assert not any(type(module) is torch.nn.Linear for module in inside)
    assert type(transformer.img_in) is torch.nn.Linear
    held = sum(tensor.nbytes for tensor in transformer.state_dict().values())
    counted = model_memory(Checkpoint(folder), torch.float32, quantization=method).components["transformer"].nbytes
    assert counted == pytest.approx(held, rel=0.15), "scales and norms are a large part of a tiny model"


@pytest.mark.parametrize("method", METHODS)
def test_the_bundled_model_stays_close_to_itself(method):
    request = make_request(EMOJI, "a rocket on a black background", seed=1, num_inference_steps=12)
    load_emoji = pipeline_class(Checkpoint(str(EMOJI))).load
    with torch.inference_mode():
        exact, close = (
            generate(load_emoji(str(EMOJI), dtype=torch.float32, device=CPU, **options), request)
            for options in ({}, {"quantization": method})
        )
    error = (exact - close).square().mean().item()
    psnr = 10 * math.log10((exact.max() - exact.min()).item() ** 2 / error)
    assert psnr > LEAST_PSNR[method]


def test_what_is_quantized_already_is_refused(qwen_image_folders, tmp_path):
    model = Path(shutil.copytree(qwen_image_folders["tiny"], tmp_path / "model"))
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(ConfigurationError, match="transformer/ is quantized already; leave it out"):
        QwenImagePipeline.load(str(model), dtype=torch.float32, device=CPU, quantization="int8")


def test_methods_are_those_that_may_be_asked_for():
    assert set(METHODS) == set(QUANTIZATIONS)
    with pytest.raises(ConfigurationError, match="quantization='awq' is not valid: it must be one of fp8, int8"):
        EngineSettings.from_dict({"quantization": "awq"})


class OtherKind(torch.Tensor):
    """A weight that knows how it is multiplied, as torchao's are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            return torch.full((args[0].shape[0], args[1].shape[0]), 7.0)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_weight_of_another_kind_is_multiplied_as_it_knows_how():
    """A kernel for plain tensors fails with those of torchao."""
    layer = torch.nn.Linear(16, 32)
    layer.weight = torch.nn.Parameter(torch.zeros(32, 16).as_subclass(OtherKind), requires_grad=False)
    assert (linear(layer, torch.ones(16, 16)) == 7).all()
