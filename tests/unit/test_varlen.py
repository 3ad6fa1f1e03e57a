"""Which attention kernel a GPU is given, and what it is asked; on a GPU that computes nothing."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tests.unit.fake_cuda import DEVICE, fake_cuda
from vllm_cfg_plugin.pipelines.common import varlen
from vllm_cfg_plugin.pipelines.common.attention import attend_sequences
from vllm_cfg_plugin.pipelines.common.packing import PackedRows

OURS = "vllm_cfg_plugin.pipelines.common.varlen"
PROCESSOR = SimpleNamespace()


@pytest.fixture(autouse=True)
def forget_choice():
    varlen.varlen_kernel.cache_clear()
    yield
    varlen.varlen_kernel.cache_clear()


@pytest.mark.parametrize(
    ("capability", "has_fa3", "dtype", "kernel"),
    [
        ((9, 0), True, torch.bfloat16, varlen.flash_attention_3),
        ((9, 0), True, torch.float16, varlen.flash_attention_3),
        ((9, 0), True, torch.float32, None),
        ((9, 0), False, torch.bfloat16, varlen.torch_varlen),
        ((10, 0), True, torch.bfloat16, varlen.torch_varlen),
        ((8, 9), True, torch.bfloat16, varlen.torch_varlen),
        ((7, 5), True, torch.float16, None),
    ],
)
def test_the_kernel_follows_from_the_gpu(monkeypatch, capability, has_fa3, dtype, kernel):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr(f"{OURS}._has_flash_attention_3", lambda: has_fa3)
    assert varlen.varlen_kernel(DEVICE, dtype) is kernel


def test_a_cpu_has_none():
    assert varlen.varlen_kernel(torch.device("cpu"), torch.bfloat16) is None


def attend(processor=PROCESSOR, keys=None):
    """Shapes of what sequences of 5 and 3 rows get."""
    rows = PackedRows((5, 3), DEVICE)
    key_rows = None if keys is None else PackedRows(keys, DEVICE)
    query, key = (torch.empty(16, 2, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return [[*own.shape] for own in attend_sequences(query, key, key, rows, processor, key_rows)]


def test_flash_attention_3_neither_splits_keys_nor_sees_padding(monkeypatch):
    asked = []

    def flash_attn_varlen_func(query, key, value, **arguments):
        asked.append(([query.shape[0], key.shape[0], value.shape[0]], arguments))
        return torch.empty_like(query)

    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, FA3_AVAILABLE=True)
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", SimpleNamespace(flash_attn_interface=module))
    with fake_cuda():
        assert attend(keys=(7, 4)) == [[5, 128], [3, 128]]
    [(rows, arguments)] = asked
    assert rows == [8, 11, 11]
    lengths = arguments.pop("cu_seqlens_q"), arguments.pop("cu_seqlens_k")
    assert [each.shape for each in lengths] == [(3,), (3,)]
    assert arguments == {"max_seqlen_q": 5, "max_seqlen_k": 7, "num_splits": 1, "fa_version": 3}


def test_without_it_torch_has_one_launch_for_all_sequences():
    with fake_cuda() as gpu:
        counts = gpu.start_counting()
        assert attend() == [[5, 128], [3, 128]]
    assert [name for name in counts.launches if "attn" in name] == ["torch_attn::_varlen_attn"]
    assert counts.launches["torch_attn::_varlen_attn"] == 1


def test_a_kernel_that_the_user_chose_is_called_instead(monkeypatch):
    chosen = []

    def dispatch(query, key, value, backend):
        chosen.append(backend)
        return query

    monkeypatch.setattr("vllm_cfg_plugin.pipelines.common.attention.dispatch_attention_fn", dispatch)
    with fake_cuda():
        attend(SimpleNamespace(_attention_backend="sage"))
    assert chosen == ["sage", "sage"]
