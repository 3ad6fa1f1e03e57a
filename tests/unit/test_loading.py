"""Loading: each component straight to its device, and what stays in host memory."""

import threading
import time
from pathlib import Path

import pytest
import torch
from diffusers.pipelines import pipeline_utils

from tests.contract import make_request
from tests.model_builders import qwen_image
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.pipelines import components
from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline

CPU, META = torch.device("cpu"), torch.device("meta")
MODELS = ("transformer", "text_encoder", "vae")


class PeakOfAnonymousMemory:
    """Megabytes of this process that no file backs: the most while this is entered, above those before."""

    def __enter__(self):
        self._done = threading.Event()
        self._before = self.peak = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self.peak -= self._before

    def _watch(self):
        while not self._done.is_set():
            self.peak = max(self.peak, self._now())
            time.sleep(0.001)

    @staticmethod
    def _now():
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("RssAnon:")[1].split()[0]) / 1024


@pytest.fixture(scope="module")
def heavy_model(tmp_path_factory):
    """A Qwen-Image of 150 MB."""
    folder = qwen_image.build_qwen_image(tmp_path_factory.mktemp("model"))
    size = qwen_image.ModelSize(heads=8, head_dim=64, rope_axes=(16, 24, 24), layers=4)
    qwen_image.transformer(size).save_pretrained(folder / "transformer")
    return str(folder)


def test_a_component_goes_to_its_device_without_a_copy_of_all_on_the_host(heavy_model, qwen_image_folders, monkeypatch):
    """The meta device stands in for a GPU."""
    monkeypatch.setattr(pipeline_utils, "SUPPORTED_DEVICE_MAP", ["meta", "cpu"])
    tiny = str(qwen_image_folders["tiny"])  # imports what is needed, and leaves no freed memory for the other one
    QwenImagePipeline.load(tiny, dtype=torch.bfloat16, device=META)
    with PeakOfAnonymousMemory() as memory:
        pipeline = QwenImagePipeline.load(heavy_model, dtype=torch.bfloat16, device=META)
    assert {getattr(pipeline, name).device.type for name in MODELS} == {"meta"}
    megabytes = sum(p.numel() * 2 for p in pipeline.transformer.parameters()) / 2**20
    assert megabytes > 70
    assert memory.peak < megabytes / 2


def test_what_is_quantized_is_read_from_its_file_layer_by_layer(heavy_model):
    """Without a copy of it on the host, in the type that the file has."""
    transformer = QwenImagePipeline.load(heavy_model, dtype=torch.float32, device=CPU).transformer
    megabytes = sum(p.nbytes for p in transformer.parameters()) / 2**20
    del transformer
    with PeakOfAnonymousMemory() as memory:
        QwenImagePipeline.load(heavy_model, dtype=torch.float32, device=META, quantization="int8")
    assert memory.peak < megabytes / 2


def test_streamed_text_encoders_give_the_same_bits(qwen_image_folders, monkeypatch):
    folder = qwen_image_folders["tiny"]
    onloaded = []
    stream = components.stream_layers
    monkeypatch.setattr(
        components, "stream_layers", lambda model, device: (onloaded.append(device), stream(model, device))
    )
    options = {"dtype": torch.float32, "device": CPU}
    resident = QwenImagePipeline.load(str(folder), **options)
    streamed = QwenImagePipeline.load(str(folder), **options, streamed=["text_encoder"])
    assert onloaded == [CPU]
    request = make_request(folder, "a red apple", seed=1)
    for _ in range(2):  # the order of the layers is learned from the first call
        pair = [pipeline.encode_branch(request, 0).tokens for pipeline in (resident, streamed)]
        assert torch.equal(*pair)


def test_a_streamed_component_has_the_files_of_its_variant(qwen_image_folders, monkeypatch):
    asked = {}

    class Model(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, model, **options):
            asked.update(options)
            return cls()

    monkeypatch.setattr(components, "component_class", lambda *_: Model)
    monkeypatch.setattr(components, "component_variants", lambda *_: {"vae": "fp16"})
    checkpoint = Checkpoint(str(qwen_image_folders["tiny"]))
    for name, variant in {"text_encoder": None, "vae": "fp16"}.items():
        components.load_streamed(checkpoint, QwenImagePipeline, name, torch.float32, CPU, "fp16")
        assert (asked["variant"], asked["subfolder"], asked["use_safetensors"]) == (variant, name, True)
