"""What a model takes of a GPU, and what goes where: counted without a GPU and without loading anything."""

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.known_models import MODELS
from benchmarks.memory_table import GIGABYTES, QUANTIZATIONS, SHARE, memory_of, table
from tests.families import FAMILIES, load
from tests.model_builders.qwen_image import build_qwen_image
from tests.unit.played_group import Played
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.memory import start
from vllm_cfg_plugin.memory.__main__ import main
from vllm_cfg_plugin.memory.placement import CACHE_BYTES, GIB, Card, Component, ModelMemory, fits, place
from vllm_cfg_plugin.memory.sizing import model_memory
from vllm_cfg_plugin.memory.tracking import peak_bytes
from vllm_cfg_plugin.pipelines.common.tensor_parallel import divide

META = torch.device("meta")
# 30 GB of transformer and 20 of text encoder, of which 2 at a time; a step of one branch takes 1, of two 2, a decode 3.
MODEL = ModelMemory(
    components={
        "transformer": Component(30 * GIB, 3 * GIB, layers=29 * GIB),
        "text_encoder": Component(15 * GIB, GIB),
        "text_encoder_2": Component(5 * GIB, GIB),
        "vae": Component(GIB, GIB),
    },
    branch_tokens=1024,
    image_tokens=1024,
    step_bytes=0,
    step_token_bytes=GIB // 1024,
    decode_token_bytes=3 * GIB // 1024,
)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_weights_that_ranks_share_are_counted_as_each_has_them(ranks, tmp_path):
    """As they are loaded; and a step takes less too, for heads and hidden channels are divided."""
    checkpoint = Checkpoint(str(build_qwen_image(tmp_path / "model", size="small")))
    whole, found = (model_memory(checkpoint, torch.float32, tensor_parallel_size=size) for size in (1, ranks))
    transformer = load(Path(checkpoint.model)).transformer
    divide(transformer, transformer.tensor_plan, Played(0, ranks))
    assert found.components["transformer"].nbytes == sum(own.nbytes for own in transformer.parameters())
    assert found.components["vae"] == whole.components["vae"]
    assert found.components["text_encoder"] == whole.components["text_encoder"]
    assert (found.step_token_bytes < whole.step_token_bytes) == (ranks > 1)


def card(gigabytes):
    return Card(int(gigabytes * GIB), 1.0)


def test_peak_counts_what_lives_at_a_time_and_no_view_twice():
    weight = torch.empty(10, 10, device=META)
    with torch.inference_mode(), peak_bytes(META) as counted:
        first = weight + 1
        view = first.view(-1)
        second = view * 2
        del first, view
        gc.collect()
        assert (counted.live, counted.peak) == (400, 800)
        weight.add_(1)
        torch.empty(100)
        assert (counted.live, counted.peak) == (400, 800), "of this device alone, and no weight"
    assert second.shape == (100,)


def test_attention_keeps_no_scores():
    query = torch.empty(1, 2, 1000, 8, device=META)
    with peak_bytes(META) as counted:
        out = torch.nn.functional.scaled_dot_product_attention(query, query, value=query)
    assert out.shape == query.shape
    assert counted.peak == query.nbytes


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label)
def test_of_every_family_all_is_known(family, tmp_path):
    folder = family.build(tmp_path / "model")
    model = model_memory(Checkpoint(str(folder)), torch.float32)
    loaded = load(folder)
    for name, component in model.components.items():
        tensors = {tensor.data_ptr(): tensor for tensor in getattr(loaded, name).state_dict().values()}  # some are tied
        expected = sum(tensor.nbytes for tensor in tensors.values())
        assert component.nbytes == pytest.approx(expected, rel=0.01), name
        assert 0 < component.streamed <= component.nbytes
        assert (component.layers > 0) == name.startswith("transformer"), name
    assert model.step_token_bytes > 0
    assert model.decode_token_bytes > 0


def test_weights_are_counted_in_the_dtype_they_are_loaded_in(qwen_image_folders):
    checkpoint = Checkpoint(str(qwen_image_folders["tiny"]))
    float32, bfloat16 = (model_memory(checkpoint, dtype).components for dtype in (torch.float32, torch.bfloat16))
    assert all(float32[name].nbytes == 2 * bfloat16[name].nbytes for name in float32)


def test_of_processes_that_share_a_forward_each_has_its_part_of_the_step(qwen_image_folders):
    checkpoint = Checkpoint(str(qwen_image_folders["tiny"]))
    alone, shared = (model_memory(checkpoint, torch.float32, sequence_parallel_size=size) for size in (1, 2))
    assert shared.step(2) < 0.75 * alone.step(2)
    assert (shared.components, shared.decode) == (alone.components, alone.decode)


@pytest.fixture(scope="module")
def well_known():
    return {f"{name}{suffix}": memory_of(name, of) for name in MODELS for suffix, of in QUANTIZATIONS.items()}


def test_the_table_in_the_docs_is_what_the_calculator_says(well_known):
    """To half a GB: what a step takes besides the weights moves a little with the code."""
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    counted = [[*map(str.strip, line.split("|"))] for line in table(well_known).splitlines()[2:]]
    known = tuple(f"| {name}" for name in MODELS)
    rows = [[*map(str.strip, line.split("|"))] for line in page.splitlines() if line.startswith(known)]
    assert [row[:3] for row in counted] == [row[:3] for row in rows]
    for row, in_docs in zip(counted, rows, strict=True):
        for cell, cell_in_docs in zip(row[3:-1], in_docs[3:-1], strict=True):
            (where, needed), (documented, documented_need) = cell.split(": "), cell_in_docs.split(": ")
            (place_of_text, *layers), (documented_place, *documented_layers) = (
                where.split(" + "),
                documented.split(" + "),
            )
            is_close = any(abs(SHARE * gigabytes - float(needed)) < 0.5 for gigabytes in GIGABYTES)
            if is_close and not layers:
                continue  # a hair more or less decides
            assert place_of_text == documented_place
            assert [*map(float, layers)] == pytest.approx([*map(float, documented_layers)], abs=0.5)
            assert float(needed) == pytest.approx(float(documented_need), abs=0.5)


@pytest.mark.parametrize("name", MODELS)
def test_well_known_models_have_their_known_sizes(name, well_known):
    components = well_known[name].components
    billions = {component: size.nbytes / 2e9 for component, size in components.items()}
    encoder = {"Qwen-Image": "text_encoder", "FLUX.1-dev": "text_encoder_2", "Wan 2.2 T2V A14B": "text_encoder"}
    assert (billions["transformer"], billions[encoder.get(name, "text_encoder_3")]) == pytest.approx(
        {
            "Qwen-Image": (20.43, 8.29),
            "FLUX.1-dev": (11.9, 4.76),
            "Stable Diffusion 3.5 large": (8.06, 4.76),
            "Wan 2.2 T2V A14B": (14.29, 5.68),
        }[name],
        rel=0.005,
    )


def test_the_first_placement_that_fits_is_taken():
    one_rank, two_ranks = (
        [place(MODEL, card(gb), ranks).text_encoder for gb in (60, 56.7, 54, 40)] for ranks in (1, 2)
    )
    assert one_rank == ["all", "cpu", "cpu", "cpu"]
    assert two_ranks == ["all", "all", "one", "cpu"]


def test_a_placement_says_what_the_fullest_rank_needs():
    everything = place(MODEL, card(99), 1)
    assert everything.needed == (51 + 2 + 3) * GIB + CACHE_BYTES
    assert place(MODEL, card(99), 2).needed == (51 + 1 + 3) * GIB + CACHE_BYTES
    assert place(MODEL, card(99), 2, "one").needed == (51 + 1) * GIB + CACHE_BYTES, (
        "the rank with encoders decodes nothing"
    )
    streamed = place(MODEL, card(99), 1, "cpu")
    assert (streamed.needed, streamed.host) == ((33 + 2 + 3) * GIB + CACHE_BYTES, 20 * GIB)


def test_layers_of_a_transformer_go_to_host_memory_where_nothing_else_helps():
    """As few as must; there is room for two of them, of 2 GB together, on their way."""
    assert place(MODEL, card(38.75), 1).offloaded == 0
    tight = place(MODEL, card(30), 1)
    assert (tight.text_encoder, tight.offloaded, tight.needed) == ("cpu", 8.75 * GIB + 2 * GIB, 30 * GIB)
    assert (tight.host, tight.resident["transformer"]) == ((20 + 10.75) * GIB, (30 - 10.75) * GIB)
    assert place(MODEL, card(11.75), 1).offloaded == 29 * GIB
    assert not fits(place(MODEL, card(11.7), 1), card(11.7))
    asked = place(MODEL, card(99), 1, offloaded=4 * GIB)
    assert (asked.text_encoder, asked.offloaded, asked.needed) == ("all", 4 * GIB, (51 + 5 - 4 + 2) * GIB + CACHE_BYTES)
    assert place(MODEL, card(52), 1, "all").offloaded == (56.75 - 52 + 2) * GIB


def test_of_two_experts_both_give_layers_and_one_has_them_on_their_way():
    expert = Component(30 * GIB, 3 * GIB, layers=29 * GIB)
    model = ModelMemory({"transformer": expert, "transformer_2": expert}, 0, 0, 0, 0, 0)
    placement = place(model, card(40.75), 1)
    assert placement.resident == {"transformer": 19 * GIB, "transformer_2": 19 * GIB}
    assert placement.work["layers on their way"] == 2 * GIB
    assert fits(placement, card(40.75))


def test_gpu_memory_utilization_counts():
    whole, half = Card(60 * GIB, 1.0), Card(60 * GIB, 0.5)
    assert fits(place(MODEL, whole, 1), whole)
    assert (place(MODEL, whole, 1).offloaded, place(MODEL, half, 1).offloaded) == (0, (38.75 - 30 + 2) * GIB)


@pytest.fixture
def any_checkpoint(monkeypatch):
    """One whose pipeline is described by what a test says of it."""
    described = SimpleNamespace(call_arguments=None)
    monkeypatch.setattr(start, "describe", lambda checkpoint: described)
    return described


def test_what_diffusers_loads_as_a_whole_is_placed_as_it_is(any_checkpoint, qwen_image_folders):
    any_checkpoint.call_arguments = {}
    checkpoint = Checkpoint(str(qwen_image_folders["tiny"]))
    for name, value in (("cfg_text_encoder", "one"), ("quantization", "int8"), ("cpu_offload_gb", 2)):
        settings = EngineSettings(**{name: value})
        with pytest.raises(ConfigurationError, match=f"{name}={value!r} is not valid .* leave it out"):
            start.choose_places(checkpoint, settings, torch.float32, None)
    places = start.choose_places(checkpoint, EngineSettings(), torch.float32, card(1))
    assert places == {"cfg_text_encoder": "all", "cpu_offload_gb": 0}


def test_start_up_refuses_what_cannot_fit_with_the_calculators_line(monkeypatch, any_checkpoint):
    monkeypatch.setattr(start, "model_memory", lambda *_: MODEL)
    checkpoint = Checkpoint("some/model")

    def choose(gigabytes, **settings):
        settings = EngineSettings(**settings)
        return tuple(start.choose_places(checkpoint, settings, torch.bfloat16, card(gigabytes)).values())

    assert (choose(60), choose(54, cfg_parallel_size=2), choose(60, cfg_text_encoder="cpu")) == (
        ("all", 0),
        ("one", 0),
        ("cpu", 0),
    )
    assert choose(24) == ("cpu", pytest.approx(38.75 - 24 + 2))
    message = r"'some/model' does not fit: with text encoders in host memory a rank needs 38.8 GB and may use 9.0 GB"
    with pytest.raises(ConfigurationError, match=message):
        choose(9)
    message = "with text encoders on the GPU and 2.0 GB of the transformer's layers in host memory a rank needs 56.8 GB"
    with pytest.raises(ConfigurationError, match=message):
        choose(50, cfg_text_encoder="all", cpu_offload_gb=2)


def test_on_a_cpu_and_for_what_cannot_be_counted_the_operator_decides(monkeypatch, any_checkpoint):
    def fail(*_):
        raise AttributeError("no transformer")

    monkeypatch.setattr(start, "model_memory", fail)
    for device in (None, card(1)):
        for asked in ("one", None):
            settings = EngineSettings(cfg_text_encoder=asked)
            places = start.choose_places(Checkpoint("m"), settings, torch.float32, device)
            assert places == {"cfg_text_encoder": asked or "all", "cpu_offload_gb": 0}


def test_the_command_prints_what_goes_where(qwen_image_folders, capsys):
    model = str(qwen_image_folders["tiny"])
    assert main([model, "--gpu", "24", "--ranks", "2", "--cfg-text-encoder", "one"]) == 0
    printed = capsys.readouterr().out
    assert "text_encoder" in printed
    assert "on the first rank" in printed
    assert "Fits with text encoders on the first rank" in printed
    assert main([model, "--gpu", "0.1"]) == 1
    assert "does not fit: with text encoders in host memory" in capsys.readouterr().out
    assert main([model, "--gpu", "24", "--cpu-offload-gb", "9", "--sequence-parallel-size", "2"]) == 0
    assert "on every rank, some layers in host memory" in capsys.readouterr().out


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys, qwen_image_folders):
    with pytest.raises(SystemExit):
        main([str(qwen_image_folders["tiny"]), "--gpu", "24", "--sequence-parallel-size", "3"])
    assert "must divide" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--gpu", "24"])
    assert "is not a diffusers checkpoint" in capsys.readouterr().err


def test_settings_name_the_places_that_text_encoders_may_have():
    assert EngineSettings.from_dict({"cfg_text_encoder": "one", "cfg_parallel_size": 2}).encoder_rank == 0
    assert EngineSettings.from_dict({"cfg_text_encoder": "one"}).encoder_rank is None, "a rank alone is every rank"
    with pytest.raises(
        ConfigurationError, match="cfg_text_encoder='gpu' is not valid: it must be one of all, one, cpu"
    ):
        EngineSettings.from_dict({"cfg_text_encoder": "gpu"})


def test_of_two_experts_both_are_counted(tmp_path):
    family = next(family for family in FAMILIES if family.label == "WanPipeline (2.2 14B)")
    components = model_memory(Checkpoint(str(family.build(tmp_path / "model"))), torch.bfloat16).components
    assert components["transformer"] == components["transformer_2"]
    assert components["vae"].nbytes > 0
