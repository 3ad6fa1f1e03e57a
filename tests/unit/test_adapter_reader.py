"""Adapter files as people have them: what they say is applied exactly, and what can't be is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import RANK, make_adapter
from tests.families import load
from tests.model_builders.flux import build_flux
from tests.model_builders.wan import build_wan
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.params import LoRA
from vllm_cfg_plugin.pipelines.adapter_files import find_adapter
from vllm_cfg_plugin.pipelines.adapter_reader import read_adapter

LAYER = "transformer_blocks.0.attn.to_q"
KOHYA = "lora_unet_transformer_blocks_0_attn_to_q"


@pytest.fixture(scope="module")
def pipeline(qwen_image_folders):
    return load(qwen_image_folders["tiny"])


@pytest.fixture
def halves(pipeline):
    """Both matrices of an adapter of `LAYER`."""
    torch.manual_seed(0)
    layer = pipeline.transformer.get_submodule(LAYER)
    return torch.randn(RANK, layer.in_features), torch.randn(layer.out_features, RANK)


def read(path, pipeline, max_rank=64):
    return read_adapter(find_adapter("pixel", str(path)), pipeline, max_rank)


def product(adapter, layer):
    """What the adapter adds to a layer's weights."""
    down, up = adapter.layers[layer.adapted_as]
    return up @ down


def test_the_matrices_of_diffusers_layout(pipeline, tmp_path):
    path = make_adapter(tmp_path / "a.safetensors", pipeline.transformer)
    adapter, tensors = read(path, pipeline), load_file(path)
    assert len(adapter.layers) == len(tensors) // 2
    assert {own.down.shape[0] for own in adapter.layers.values()} == {8}, "a rank that products of any rows may have"
    assert adapter.modulates
    for name, layer in pipeline.transformer.named_modules():
        if f"transformer.{name}" in adapter.layers:
            down, up = (tensors[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
            torch.testing.assert_close(product(adapter, layer), up @ down, rtol=0, atol=1e-5)


def test_layers_that_make_no_modulations_do_not_modulate(pipeline, tmp_path):
    assert not read(make_adapter(tmp_path / "a.safetensors", pipeline.transformer, layers="attn"), pipeline).modulates


# A file's tensors by the two matrices, its metadata, peft's configuration beside it -> the weight of their product.
LAYOUTS = {
    "diffusers": (("transformer." + LAYER, "lora_A", "lora_B"), {}, None, None, 1.0),
    "diffusers, older": (("transformer." + LAYER, "lora.down", "lora.up"), {}, None, None, 1.0),
    "diffusers, with its metadata": (
        ("transformer." + LAYER, "lora_A", "lora_B"),
        {"transformer.r": RANK, "transformer.lora_alpha": 3 * RANK},
        None,
        None,
        3.0,
    ),
    "peft": (
        ("base_model.model." + LAYER, "lora_A", "lora_B"),
        {},
        {"r": RANK, "lora_alpha": RANK, "alpha_pattern": {"attn.to_q": RANK / 2}},
        None,
        0.5,
    ),
    "peft, rank stabilised": (
        ("base_model.model." + LAYER, "lora_A", "lora_B"),
        {},
        {"r": RANK, "lora_alpha": 6, "use_rslora": True},
        None,
        3.0,
    ),
    "kohya": ((KOHYA, "lora_down", "lora_up"), {}, None, 1.0, 1 / RANK),
    "ComfyUI": (("diffusion_model." + LAYER, "lora_A", "lora_B"), {}, None, None, 1.0),
    "ComfyUI, with alpha": (("diffusion_model." + LAYER, "lora_down", "lora_up"), {}, None, 2.0, 2 / RANK),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(pipeline, halves, tmp_path, layout):
    (name, down, up), metadata, config, alpha, weight = LAYOUTS[layout]
    tensors = {f"{name}.{down}.weight": halves[0], f"{name}.{up}.weight": halves[1]}
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(
        tensors,
        tmp_path / "adapter_model.safetensors",
        {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {},
    )
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = read(tmp_path, pipeline)
    assert [*adapter.layers] == [f"transformer.{LAYER}"]
    layer = pipeline.transformer.get_submodule(LAYER)
    torch.testing.assert_close(product(adapter, layer), weight * halves[1] @ halves[0])


def test_kohyas_joint_layers_of_flux_are_taken_apart(tmp_path):
    ours = load(build_flux(tmp_path / "model"))
    layer = ours.transformer.transformer_blocks[0].attn.to_q
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    torch.manual_seed(0)
    down, up = torch.randn(RANK, layer.in_features), torch.randn(3 * layer.out_features, RANK)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read(tmp_path / "a.safetensors", ours)
    assert len(adapter.layers) == 3
    expected = 2 / RANK * up[: layer.out_features] @ down
    torch.testing.assert_close(product(adapter, layer), expected)


def test_alphas_that_fluxs_converter_keeps_apart(tmp_path):
    ours = load(build_flux(tmp_path / "model"))
    layer, name = ours.transformer.transformer_blocks[0].attn.to_q, "transformer.transformer_blocks.0.attn.to_q"
    down, up = torch.randn(RANK, layer.in_features), torch.randn(layer.out_features, RANK)
    alpha = {f"{name}.alpha": torch.tensor(2.0)}
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up} | alpha, tmp_path / "a.safetensors")
    adapter = read(tmp_path / "a.safetensors", ours)
    torch.testing.assert_close(product(adapter, layer), 2 / RANK * up @ down)


def test_wans_own_names_and_its_second_expert(tmp_path):
    ours = load(build_wan(tmp_path / "model", layout="2.2"))
    layer = ours.transformer.blocks[0].attn1.to_q
    down, up = torch.randn(RANK, layer.in_features), torch.randn(layer.out_features, RANK)
    names = {
        "diffusion_model.blocks.0.self_attn.q": "transformer",
        "transformer_2.blocks.0.attn1.to_q": "transformer_2",
    }
    for number, (name, component) in enumerate(names.items()):
        path = tmp_path / f"{number}.safetensors"
        save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
        assert [*read(path, ours).layers] == [f"{component}.blocks.0.attn1.to_q"]
        assert getattr(ours, component).blocks[0].attn1.to_q.adapted_as == f"{component}.blocks.0.attn1.to_q"


def test_the_files_type_becomes_the_models(pipeline, halves, tmp_path):
    tensors = {f"transformer.{LAYER}.lora_{half}.weight": tensor for half, tensor in zip("AB", halves, strict=True)}
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in read(tmp_path, pipeline).tensors} == {torch.float32}


def changed(**names):
    """An adapter of `LAYER` with other names."""
    return lambda down, up: {
        f"transformer.{names.get('layer', LAYER)}.{names.get('down', 'lora_A')}.weight": down,
        f"transformer.{names.get('layer', LAYER)}.{names.get('up', 'lora_B')}.weight": up,
    }


UNFIT = {
    "unknown layer": (changed(layer="blocks.7.to_q"), "transformer.blocks.7.to_q.lora_A.weight fits no layer"),
    "closed layer": (
        changed(layer="time_text_embed.timestep_embedder.linear_1"),
        "fits no layer of the model: it is none that adapters of requests can adapt",
    ),
    "half a layer": (lambda down, up: {f"transformer.{LAYER}.lora_A.weight": down}, "has no .*lora_B.weight beside it"),
    "another shape": (
        lambda down, up: changed()(down[:, 1:].contiguous(), up),
        r"has shape \[4, \d+\] .* the layer has",
    ),
    "a key more": (
        lambda down, up: changed()(down, up) | {"transformer.x.lora_B.bias": up[0].clone()},
        "transformer.x.lora_B.bias fits",
    ),
    "DoRA": (
        lambda down, up: changed()(down, up) | {f"transformer.{LAYER}.dora_scale": up[0].clone()},
        "is a part of a DoRA",
    ),
    "LoKr": (lambda down, up: {f"{LAYER}.lokr_w1": down}, "is a part of a LoKr"),
    "text encoder": (
        lambda down, up: {
            name.replace("transformer.", "text_encoder.", 1): tensor for name, tensor in changed()(down, up).items()
        },
        "adapts a text encoder, which is not supported",
    ),
    "not finite": (lambda down, up: changed()(down, up * float("nan")), "is not finite"),
    "empty": (lambda down, up: {}, "it has no layers|can't be read"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_can_not_be_applied_is_refused(pipeline, halves, tmp_path, kind):
    make, message = UNFIT[kind]
    save_file(make(*halves), tmp_path / "a.safetensors")
    with pytest.raises(ConfigurationError, match=message) as refused:
        read(tmp_path, pipeline)
    assert "adapter 'pixel'" in str(refused.value)


def test_a_rank_above_the_limit(pipeline, halves, tmp_path):
    save_file(changed()(*halves), tmp_path / "a.safetensors")
    with pytest.raises(ConfigurationError, match=f"has rank {RANK}, and --max-lora-rank is 2"):
        read(tmp_path, pipeline, max_rank=2)


def test_pefts_dora_is_refused(pipeline, halves, tmp_path):
    save_file(changed()(*halves), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "use_dora": true}')
    with pytest.raises(ConfigurationError, match="it is a DoRA"):
        read(tmp_path, pipeline)


def test_a_file_that_has_changed_is_another_adapter(pipeline, tmp_path):
    lora = find_adapter("pixel", str(make_adapter(tmp_path / "a.safetensors", pipeline.transformer)))
    make_adapter(tmp_path / "a.safetensors", pipeline.transformer, rank=2)
    with pytest.raises(ConfigurationError, match="has changed: load it again"):
        read_adapter(lora, pipeline, 64)
    with pytest.raises(ConfigurationError, match="No such file"):
        read_adapter(LoRA("pixel", str(tmp_path / "gone"), ""), pipeline, 64)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "there is no file or folder"),
        (("pytorch_lora_weights.bin",), "pytorch_lora_weights.bin is a pickle, which is not loaded"),
        (("notes.txt",), "has no .safetensors file$"),
        (
            ("a.safetensors", "b.safetensors"),
            "several .safetensors files, name one of them: a.safetensors, b.safetensors",
        ),
        (("a.safetensors",), "a.safetensors is broken: its 3 bytes end before its header does"),
    ],
)
def test_files_that_are_no_adapters(tmp_path, files, message):
    folder = tmp_path / "adapter"
    for name in files:
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"abc")
    with pytest.raises(ConfigurationError, match=message):
        find_adapter("pixel", str(folder))


def test_a_pickle_by_its_name(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"abc")
    with pytest.raises(ConfigurationError, match=r"is no \.safetensors file: a\.bin is a pickle"):
        find_adapter("pixel", str(tmp_path / "a.bin"))
