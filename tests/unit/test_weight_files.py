"""Files in a checkpoint: what diffusers would load counts, and nothing else; each refusal is one line."""

import json
import shutil

import pytest
import torch

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline
from vllm_cfg_plugin.pipelines.registry import check_servable

WEIGHTS = "diffusion_pytorch_model"
CPU = torch.device("cpu")


@pytest.fixture
def model(qwen_image_folders, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(qwen_image_folders["tiny"], tmp_path / "copy")


def refusal(model, variant=""):
    with pytest.raises(ConfigurationError) as refused:
        check_servable(Checkpoint(str(model)), variant)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def load(model, **options):
    return QwenImagePipeline.load(str(model), dtype=torch.float32, device=CPU, **options)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (f"._{WEIGHTS}.safetensors", "Mac OS X"),
        (f"{WEIGHTS}.safetensors.index.fp16.json", '{"weight_map": {"a": "part-1.fp16.safetensors"}}'),
        (f"{WEIGHTS}.fp16.safetensors", "half a download"),
        ("old.safetensors", "half a download"),
        (f"{WEIGHTS}.bin.index.json", '{"weight_map": {"a": "part-1.bin"}}'),
    ],
)
def test_what_diffusers_never_reads_may_lie_about(model, name, content):
    (model / "transformer" / name).write_text(content)
    check_servable(Checkpoint(str(model)))
    load(model)


def as_variant(folder):
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_a_variant_is_offered_and_loads(model, component):
    as_variant(model / component)
    assert (
        f"{component}/ has its weights under names of the variant fp16 only: ask for it by --variant fp16"
        in refusal(model)
    )
    check_servable(Checkpoint(str(model)), "fp16")
    load(model, variant="fp16")


def test_a_variant_that_is_not_there_is_refused(model):
    assert "variant='bf16' is not valid" in refusal(model, "bf16")


def test_a_broken_file_of_a_variant_is_named(model):
    as_variant(model / "vae")
    (model / "vae" / f"{WEIGHTS}.fp16.safetensors").write_bytes(b"x" * 50)
    assert f"vae/{WEIGHTS}.fp16.safetensors is broken" in refusal(model, "fp16")


def test_pickled_shards_are_refused(model):
    (model / "transformer" / f"{WEIGHTS}.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "part-1.bin"}}
    (model / "transformer" / f"{WEIGHTS}.bin.index.json").write_text(json.dumps(index))
    assert "transformer/ has its weights as pickles" in refusal(model)
    with pytest.raises(ConfigurationError):
        load(model)


@pytest.mark.parametrize(("component", "name"), [("transformer", WEIGHTS), ("text_encoder", "pytorch_model")])
def test_one_pickle_is_refused_too(model, component, name):
    from safetensors.torch import load_file

    (path,) = (model / component).glob("*.safetensors")
    torch.save(load_file(path), model / component / f"{name}.bin")
    path.unlink()
    assert f"{component}/ has its weights as pickles ({name}.bin)" in refusal(model)
    with pytest.raises(ConfigurationError):
        load(model)


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_a_quantization_that_cannot_run_is_named(model, component):
    """A quantization that cannot run names component and method."""
    path = model / component / "config.json"
    quantization = {"quant_method": "torchao", "quant_type": "int8wo"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    assert f"{component}/ is quantized by torchao, which can't run here: " in refusal(model)


@pytest.mark.parametrize("quantization", [{}, [], False])
def test_an_empty_quantization_is_refused_as_by_diffusers(model, quantization):
    """A quantization that says nothing is refused as diffusers refuses it."""
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    named = "an unnamed method" if quantization == {} else repr(quantization)
    assert f"transformer/ is quantized by {named}, which can't run here: " in refusal(model)
    with pytest.raises((ValueError, TypeError, AttributeError)):
        QwenImagePipeline.from_pretrained(str(model))


@pytest.mark.parametrize("quantization", [{}, {"quant_method": "nonsense"}])
def test_a_text_encoder_is_not_quantized_where_transformers_says_so(model, quantization):
    path = model / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    check_servable(Checkpoint(str(model)))
    QwenImagePipeline.from_pretrained(str(model))


@pytest.mark.parametrize("weight_map", [["a"], None, {"a": 1}, {}])
def test_an_index_that_names_no_files_is_refused_in_one_line(model, weight_map):
    (path,) = (model / "transformer").glob("*.safetensors")
    path.unlink()
    (model / "transformer" / f"{path.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert f"transformer/{path.name}.index.json names no files" in refusal(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_of_a_tokenizer_is_named(model, name):
    path = model / "tokenizer" / name
    path.write_bytes(path.read_bytes()[:-5])
    assert f"tokenizer/{name} is broken: " in refusal(model)


def test_a_tokenizer_without_files_is_named(model):
    shutil.rmtree(model / "tokenizer")
    (model / "tokenizer").mkdir()
    assert "is incomplete: tokenizer/ has no JSON files" in refusal(model)
