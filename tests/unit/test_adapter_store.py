"""What a rank keeps of adapters."""

import gc
import weakref

import pytest
import torch
from msgspec.structs import replace

from tests.adapters import make_adapter
from tests.families import load
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.adapter_files import find_adapter
from vllm_cfg_plugin.worker import adapters
from vllm_cfg_plugin.worker.adapters import AdapterLimits, AdapterStore


@pytest.fixture
def loras(qwen_image_folders, tmp_path):
    pipeline = load(qwen_image_folders["tiny"])
    files = [make_adapter(tmp_path / f"{i}.safetensors", pipeline.transformer, i, layers="to_q") for i in range(3)]
    return pipeline, [find_adapter(f"adapter-{i}", str(file)) for i, file in enumerate(files)]


def test_an_adapter_is_read_once_and_the_least_recently_used_is_forgotten(loras, monkeypatch):
    pipeline, (first, second, third) = loras
    read = []
    monkeypatch.setattr(
        adapters,
        "read_adapter",
        lambda lora, *args, real=adapters.read_adapter: read.append(lora.name) or real(lora, *args),
    )
    store = AdapterStore(pipeline, AdapterLimits(rank=16, on_host=2, on_device=1))
    for lora in (first, second, first, third, first, second):
        assert store.get(lora).key == lora.key
    assert read == ["adapter-0", "adapter-1", "adapter-2", "adapter-1"]


def test_a_request_keeps_what_it_carries(loras):
    pipeline, (first, second, _) = loras
    store = AdapterStore(pipeline, AdapterLimits(rank=16, on_host=1, on_device=1))
    carried = store.carried([first, replace(first, scale=0.5)])
    assert [scale for _, scale in carried] == [1.0, 0.5]
    assert carried[0][0] is carried[1][0]
    store.get(second)
    alive = weakref.ref(carried[0][0])
    assert alive() is not None
    del carried
    gc.collect()
    assert alive() is None, "nobody else holds it"


def test_a_file_that_is_gone_is_the_request_s_own_failure(loras, tmp_path):
    pipeline, (first, *_) = loras
    (tmp_path / "0.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"adapter 'adapter-0'.* can't be read: FileNotFoundError"):
        AdapterStore(pipeline, AdapterLimits(16, 1, 1)).carried([first])


def test_the_weights_of_the_model_are_untouched(loras):
    pipeline, (first, *_) = loras
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    AdapterStore(pipeline, AdapterLimits(16, 1, 1)).get(first)
    after = pipeline.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
