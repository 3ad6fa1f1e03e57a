"""A block's elementwise work as one kernel each: compiled once for all sizes, and right in packed forwards."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.contract import branches_of
from tests.families import FAMILIES, load
from vllm_cfg_plugin.pipelines.common import fused
from vllm_cfg_plugin.pipelines.common.generate import predict

DIM, FACTORS = 72, 6


def inputs(rows, spans, dtype):
    generator = torch.Generator().manual_seed(rows)
    stream = torch.randn(rows, DIM, generator=generator).to(dtype)
    table = torch.randn(spans, FACTORS, DIM, generator=generator).to(dtype)
    return stream, table, torch.arange(spans).repeat_interleave(rows // spans)


def modulate(function, stream, table, first, row_spans):
    return function(stream, table[:, first + 1], table[:, first], row_spans, 1e-6)


def add_gated(function, stream, table, first, row_spans):
    function(stream, stream.flip(0), table[:, first + 2], row_spans)
    return stream


def turns_of(rows, head_dim):
    angles = torch.arange(rows * head_dim // 2).view(rows, 1, -1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def norm_and_rotate(function, stream, table, first, row_spans):
    return function(stream, table[0, first], turns_of(len(stream), DIM // 3), 1e-6)


def norm_and_rotate_joint(function, stream, table, first, row_spans):
    heads = stream.unflatten(1, (3, -1))
    of_text, of_image = table[0, first : first + 2, : DIM // 3]
    return function(heads, of_text, of_image, row_spans > 0, turns_of(len(stream), DIM // 3), 1e-6)


# With a width that is no power of two, as no other number may be taken for it.
SIZES = [(48, 3), (1024, 8), (112, 2), (4096, 16), (80, 5)]


@pytest.mark.parametrize(
    ("call", "function"),
    [
        (modulate, fused.modulate_rows),
        (add_gated, fused.add_gated_rows),
        (norm_and_rotate, fused.norm_and_rotate_rows),
        (norm_and_rotate_joint, fused.norm_and_rotate_joint),
    ],
    ids=["norm", "gate", "rotate", "rotate-joint"],
)
@torch.inference_mode()
def test_kernels_of_the_first_sizes_serve_all_others(call, function):
    """Inductor's back-end for CPUs stands in for that of GPUs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    kernel = torch.compile(function, dynamic=True, fullgraph=True, backend=counter)
    compiled = []
    for rows, spans in SIZES:
        for first in (0, 3):  # of any layer: where its factors lie in the table does not matter
            stream, table, row_spans = inputs(rows, spans, torch.bfloat16)
            expected = call(function, stream.clone(), table, first, row_spans)
            got = call(kernel, stream.clone(), table, first, row_spans)
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[-1] <= 3, "torch looks at where in the table a factor lies, and at no size"


@pytest.mark.parametrize(
    "label", ["QwenImageEditPlusPipeline", "ZImagePipeline", "WanPipeline (2.1)", "StableDiffusion3Pipeline"]
)
@torch.inference_mode()
def test_row_by_row_predictions_are_those_of_spans(monkeypatch, tmp_path, label):
    family = next(family for family in FAMILIES if family.label == label)
    folder = family.build(tmp_path / "model")
    pipeline = load(folder)
    branches = [
        branch
        for step, request in enumerate(family.requests(folder))
        for branch in branches_of(pipeline, request, step)
    ]
    spans = predict(pipeline, branches)
    calls = []
    monkeypatch.setattr(fused, "is_enabled", lambda device: True)
    monkeypatch.setattr(fused, "compiled", lambda function: lambda *args: calls.append(function) or function(*args))
    rows = predict(pipeline, branches)
    assert calls
    for one, other in zip(rows, spans, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_cpu_never_uses_them(monkeypatch):
    monkeypatch.setattr(fused, "_enabled", True)
    assert not fused.is_enabled(torch.device("cpu"))
    assert fused.is_enabled(torch.device("cuda:0"))
