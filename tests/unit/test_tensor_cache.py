"""The LRU cache of tensors: limited by total bytes, and by nothing else."""

import copy
import threading
from dataclasses import dataclass
from functools import partial

import torch

from vllm_cfg_plugin.pipelines.common.packing import LayoutCache
from vllm_cfg_plugin.pipelines.common.tensor_cache import _OVERHEAD_BYTES, TensorCache


@dataclass(frozen=True)
class Pair:
    name: str
    tensors: list[torch.Tensor]
    other: torch.Tensor | None = None


def test_the_least_recently_used_is_forgotten():
    made = []

    def make(key):
        made.append(key)
        return Pair(key, [torch.zeros(2)], torch.zeros(2))  # 16 bytes

    cache = TensorCache(2 * (_OVERHEAD_BYTES + 16))
    for key in ("a", "b", "a", "c", "a", "b"):
        cache.get(key, partial(make, key))
    assert made == ["a", "b", "c", "b"]
    assert len(cache) == 2


def test_the_latest_stays_whatever_its_size():
    cache = TensorCache(8)
    large = cache.get("large", lambda: torch.zeros(1000))
    assert cache.get("large", lambda: None) is large


def test_a_copy_is_empty():
    cache = TensorCache(100)
    cache.get("a", lambda: torch.zeros(1))
    copied = copy.deepcopy(cache)
    assert (len(cache), len(copied)) == (1, 0)
    copied.get("b", lambda: torch.zeros(1))
    copied.clear()
    assert len(copied) == 0


def test_layouts_of_a_running_set_fit():
    """More keys in every step than any count of entries: nothing is made twice."""
    cache, made = LayoutCache(), []
    for _ in range(3):
        for length in range(1, 257):
            cache.get(length, lambda length=length: made.append(length) or torch.zeros(length, 3))
    assert len(made) == 256


def test_no_thread_waits_and_all_get_the_same_value():
    """No thread waits for what another one makes and all get the same value."""
    cache, begun, may_end = TensorCache(10**6), threading.Event(), threading.Event()
    found = []

    def make_slowly():
        begun.set()
        assert may_end.wait(10)
        return torch.zeros(1)

    slow = threading.Thread(target=lambda: found.append(cache.get("a", make_slowly)))
    slow.start()
    assert begun.wait(10)
    assert cache.get("b", lambda: torch.ones(1)) == 1
    first = cache.get("a", lambda: torch.zeros(1))
    may_end.set()
    slow.join()
    assert found == [first]
    assert found[0] is first
    assert cache._bytes == 2 * (_OVERHEAD_BYTES + 4)
