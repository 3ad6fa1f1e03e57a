"""CPU kernels: which CPU has which, and that under each a row is bitwise independent of the rest of the batch."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from vllm_cfg_plugin.pipelines.common import attention, cpu_kernels, linear
from vllm_cfg_plugin.pipelines.common.cpu_kernels import CpuKernels, choose_kernels
from vllm_cfg_plugin.pipelines.common.packing import PackedRows

TORCH, ONEDNN_LINEAR, ONEDNN = CpuKernels(), CpuKernels(linear=True), CpuKernels(linear=True, attention_from=256)
AS_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
CAPABILITY = torch.backends.cpu.get_cpu_capability()


@pytest.fixture(params=[TORCH, ONEDNN_LINEAR, ONEDNN], ids=["torch", "onednn-linear", "onednn"])
def kernels(request, monkeypatch):
    if request.param.linear and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    for module in (linear, attention):
        monkeypatch.setattr(module, "cpu_kernels", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("capability", "has_onednn", "has_mkl", "is_zen_5", "expected"),
    [
        ("AVX512", True, True, True, ONEDNN),
        ("AVX512", True, True, False, ONEDNN_LINEAR),
        ("AVX512", False, True, True, TORCH),
        ("AVX2", True, True, True, TORCH),
        ("AVX2", True, False, False, ONEDNN_LINEAR),
        ("AVX2", False, False, False, TORCH),
        ("DEFAULT", True, False, False, TORCH),
        ("SVE256", True, False, False, TORCH),
    ],
)
def test_choice(capability, has_onednn, has_mkl, is_zen_5, expected):
    chosen = choose_kernels(capability, has_onednn=has_onednn, has_mkl=has_mkl, is_zen_5=is_zen_5)
    assert chosen == expected


@pytest.mark.parametrize(
    ("vendor", "family", "expected"),
    [("AuthenticAMD", 26, True), ("AuthenticAMD", 25, False), ("GenuineIntel", 26, False), (None, None, False)],
)
def test_zen_5(tmp_path, monkeypatch, vendor, family, expected):
    cpuinfo = tmp_path / "cpuinfo"
    if vendor:
        cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(cpu_kernels, "_CPUINFO", cpuinfo)
    assert cpu_kernels._is_zen_5() == expected


@torch.inference_mode()
@pytest.mark.parametrize("layer", [linear.linear, linear.gelu_linear])
@pytest.mark.parametrize(("channels", "outputs"), [(48, 32), (160, 160), (160, 640), (640, 160), (384, 1536)])
def test_rows_of_a_linear_layer(kernels, layer, channels, outputs):
    torch.manual_seed(0)
    module, x = nn.Linear(channels, outputs), torch.randn(1088, channels)
    every = layer(module, x)
    for rows in (16, 32, 48, 80, 112, 256, 272, 512, 544, 1024):
        assert torch.equal(layer(module, x[:rows]), every[:rows]), rows
        assert torch.equal(layer(module, x[-rows:]), every[-rows:]), rows


@torch.inference_mode()
def test_gelu_like_torch(kernels):
    module, x = nn.Linear(32, 64), torch.randn(48, 32)
    expected = nn.functional.gelu(module(30 * x), approximate="tanh")
    torch.testing.assert_close(linear.gelu_linear(module, 30 * x), expected, rtol=1e-6, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("head_dim", [32, 64])
def test_attention_of_neighbours(kernels, head_dim):
    """Also of equal lengths, which take one call."""
    torch.manual_seed(0)
    rows = PackedRows((7, 40, 40, 40, 255, 300, 300, 1040, 1040), torch.device("cpu"))
    query, key, value = torch.randn(3, sum(rows.sizes), 2, head_dim)
    together = attention.attend_sequences(query, key, value, rows, processor=None)
    for start, length, attended in zip(rows.starts, rows.lengths, together, strict=False):
        one = PackedRows((length,), rows.device)
        alone = (stream[start : start + length] for stream in (query, key, value))
        assert torch.equal(attention.attend_sequences(*alone, one, processor=None)[0], attended), length


@pytest.mark.skipif(CAPABILITY != "AVX512", reason="only a CPU with AVX-512 can play one with AVX2 alone")
def test_all_of_this_with_avx2():
    tests = [__file__, "-q", "-k", "not test_all_of_this and not test_choice", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *tests]
    done = subprocess.run(command, env=os.environ | AS_AVX2, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(CAPABILITY != "AVX2", reason="by the test before this one")
def test_torch_computes_with_avx2():
    if torch.backends.mkl.is_available():
        assert cpu_kernels.cpu_kernels() == TORCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [900, 1100, 1536, 1790, 2400])
def test_attention_in_pieces_has_the_bits_of_one_call(monkeypatch, dtype, length):
    torch.set_num_threads(1)
    monkeypatch.setattr(attention, "cpu_kernels", CpuKernels)
    rows = PackedRows((length,), torch.device("cpu"))
    query, key, value = torch.randn(3, length, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)

    def attend():
        return attention.attend_sequences(query, key, value, rows, processor=None)[0]

    whole = attend()
    calls = []
    kernel = attention.dispatch_attention_fn
    monkeypatch.setattr(attention, "dispatch_attention_fn", lambda *args: calls.append(args) or kernel(*args))
    for most in (2 * length * length, length * length // 2, 1):
        monkeypatch.setattr(attention, "_CALL_SCORES", most)
        assert torch.equal(attend(), whole)
    assert len(calls) > 3 + 2
