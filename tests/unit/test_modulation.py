"""Modulations computed ahead: the same bits as alone, remembered, and not for ever."""

import threading

import pytest
import torch

from tests.model_builders.qwen_image import SIZES, transformer
from vllm_cfg_plugin.pipelines.common import modulation
from vllm_cfg_plugin.pipelines.common.modulation import ModulationCache
from vllm_cfg_plugin.pipelines.qwen_image.transformer import PackedQwenImageTransformer

FLOAT = torch.float32


@pytest.fixture(scope="module", params=SIZES)
def model(request):
    torch.manual_seed(0)
    return PackedQwenImageTransformer.adopt(transformer(SIZES[request.param]))


@pytest.fixture
def computed(monkeypatch):
    """The timesteps of every `compute_modulations` call."""
    calls, compute = [], PackedQwenImageTransformer.compute_modulations

    def record(model, timesteps, dtype):
        calls.append(list(timesteps))
        return compute(model, timesteps, dtype)

    monkeypatch.setattr(PackedQwenImageTransformer, "compute_modulations", record)
    return calls


def schedule(count, start=1.0):
    return torch.linspace(start, 0.02, count).tolist()


def all_factors(entry):
    return torch.stack([factor for block in entry.blocks for factor in block] + [entry.scale, entry.shift])


@torch.inference_mode()
def test_like_diffusers(model):
    [entry] = model.compute_modulations([0.7], FLOAT)
    embedded = model.time_text_embed(torch.tensor([0.7]), model.img_in.weight)
    for block, factors in zip(model.transformer_blocks, entry.blocks, strict=True):
        expected = torch.cat([block.img_mod(embedded), block.txt_mod(embedded)], dim=1).view(12, -1)
        expected[1::3] += 1
        torch.testing.assert_close(torch.stack(factors), expected, rtol=0, atol=1e-5)
    scale, shift = model.norm_out.linear(torch.nn.functional.silu(embedded)).chunk(2, dim=1)
    torch.testing.assert_close(entry.scale, 1 + scale[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entry.shift, shift[0], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_bits_do_not_depend_on_the_batch(model):
    timesteps = schedule(37)
    alone = [all_factors(model.compute_modulations([t], FLOAT)[0]) for t in timesteps]
    for count in (2, 15, 16, 17, 37):
        together = model.compute_modulations(timesteps[:count], FLOAT)
        assert all(torch.equal(all_factors(entry), own) for entry, own in zip(together, alone, strict=False))


@torch.inference_mode()
def test_the_following_steps_cost_nothing(model, computed):
    cache, timesteps = ModulationCache(), schedule(20)
    alone = [all_factors(model.compute_modulations([t], FLOAT)[0]) for t in timesteps]
    computed.clear()
    for i, t in enumerate(timesteps):
        [entry] = cache.get(model, [t], torch.tensor(timesteps[i + 1 :], dtype=torch.float64), FLOAT)
        assert torch.equal(all_factors(entry), alone[i])
    assert [len(call) for call in computed] == [16, 4]


@torch.inference_mode()
def test_schedules_share_what_they_have_in_common(model, computed):
    cache, long, short = ModulationCache(), schedule(12), schedule(8, start=0.9)
    assert long[-1] == short[-1]
    entries = cache.get(model, [long[0], short[0], long[0]], torch.tensor([], dtype=torch.float64), FLOAT)
    assert entries[0] is entries[2]
    assert computed == [[long[0], short[0]]]
    cache.get(model, [long[1], short[1]], torch.tensor(long[2:] + short[2:], dtype=torch.float64), FLOAT)
    assert len(computed[1]) == 16
    assert len(set(computed[1])) == 16
    cache.get(model, [long[6], short[-1]], torch.tensor([]), FLOAT)
    assert len(computed) == 2


@torch.inference_mode()
def test_the_least_recently_used_is_forgotten(model, computed, monkeypatch):
    monkeypatch.setattr(modulation, "_CACHE_BYTES", 0)
    monkeypatch.setattr(modulation, "_MIN_TIMESTEPS", 16)
    cache, none, timesteps = ModulationCache(), torch.tensor([]), schedule(18)
    cache.get(model, timesteps[:16], none, FLOAT)
    cache.get(model, timesteps[:1], none, FLOAT)
    cache.get(model, [timesteps[16]], none, FLOAT)
    assert len(cache._entries) == 16
    cache.get(model, timesteps[:1], none, FLOAT)
    assert len(computed) == 2
    assert len(cache.get(model, timesteps, none, FLOAT)) == 18  # more at once than are kept
    assert len(cache._entries) == 16


@torch.inference_mode()
def test_forward_computes_ahead_only_where_asked(model, computed):
    torch.manual_seed(1)
    arguments = {
        "hidden_states": torch.randn(1, 6, 16),
        "encoder_hidden_states": torch.randn(1, 3, 48),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 3)]],
    }
    model.modulations.clear()
    expected = model(**arguments)[0]
    assert not model.modulations._entries
    for _ in range(2):
        prediction = model(**arguments, timesteps_ahead=torch.tensor(schedule(5)))[0]
        assert torch.equal(prediction, expected)
    assert [len(call) for call in computed] == [1, 6]  # nothing ahead, then all of it at once


@torch.inference_mode()
def test_a_thread_finds_what_is_there_while_another_one_computes(model):
    cache, begun, may_end = ModulationCache(), threading.Event(), threading.Event()
    none, found = torch.tensor([]), []
    [known] = cache.get(model, [0.5], none, FLOAT)

    class Slow:
        def compute_modulations(self, timesteps, dtype):
            begun.set()
            assert may_end.wait(10)
            return [known] * len(timesteps)

    slow = threading.Thread(target=lambda: found.extend(cache.get(Slow(), [0.5, 0.7, 0.7], none, FLOAT)))
    slow.start()
    assert begun.wait(10)
    assert cache.get(model, [0.5], none, FLOAT) == [known]
    may_end.set()
    slow.join()
    assert len(found) == 3
    assert found[1] is found[2], "spans of one modulation are told by it being one object"
