"""Which part of a model a rank has, how it is loaded, and what ranks do with what they have; the others are played."""

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from safetensors import safe_open

from tests.distributed.packed_kinds import packed_kinds
from tests.model_builders.flux import build_flux
from tests.model_builders.qwen_image import build_qwen_image
from tests.model_builders.wan import build_wan
from tests.unit.played_group import Played
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.distributed.sequence_group import ALONE, together, use_group
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.common import divided_loading
from vllm_cfg_plugin.pipelines.common.divided_loading import load_divided
from vllm_cfg_plugin.pipelines.common.modulation import Modulation, ModulationCache, modulations_at
from vllm_cfg_plugin.pipelines.common.tensor_parallel import (
    Outputs,
    Share,
    add_up,
    divide,
    own_part,
    rms_norms,
    shares_of,
    tensor_plan,
)
from vllm_cfg_plugin.pipelines.quantized import quantize_layers
from vllm_cfg_plugin.pipelines.registry import pipeline_class

BUILDERS = {
    "qwen_image": partial(build_qwen_image, size="small"),
    "flux": build_flux,
    "wan": partial(build_wan, layout="2.1"),
}


@pytest.fixture(scope="module")
def kinds():
    return packed_kinds()


def test_every_pattern_of_a_plan_is_some_layers_name(kinds):
    """A layer that a new release of diffusers calls otherwise would be whole, and its neighbour would not."""
    for family in ("qwen_image", "z_image", "flux", "longcat_image", "sd3.5", "wan image_to_video"):
        model = kinds[family].model
        for pattern in model.tensor_plan:
            assert shares_of(model, {pattern: model.tensor_plan[pattern]}), (family, pattern)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_block_is_divided_with_all_its_layers(kinds, ranks):
    """But for the modulations of Z-Image, which take little."""
    for name, kind in kinds.items():
        models = [copy.deepcopy(kind.model) for _ in range(2)]
        divide(models[1], models[1].tensor_plan, Played(ranks - 1, ranks))
        whole, part = map(_weights_of_blocks, models)
        assert part == pytest.approx(whole / ranks, rel=0.01), name


def _weights_of_blocks(model):
    """How many numbers the linear layers of its blocks have."""
    blocks = ("transformer_blocks", "single_", "blocks", "layers", "noise_refiner", "context_refiner")
    named = model.named_modules()
    linears = [m for n, m in named if n.startswith(blocks) and "adaLN" not in n and isinstance(m, torch.nn.Linear)]
    return sum(linear.weight.numel() for linear in linears)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("rank", [0, 1])
def test_no_more_is_read_than_a_rank_has(name, rank, tmp_path, monkeypatch):
    folder = BUILDERS[name](tmp_path / "model")
    checkpoint, peers, read = Checkpoint(str(folder)), Played(rank, 2), []

    class Counting:
        """A file of safetensors that notes how much is taken of it."""

        def __init__(self, path, framework):
            self._file = safe_open(path, framework)
            self.keys, self.__exit__ = self._file.keys, self._file.__exit__

        def __enter__(self):
            return self

        def __exit__(self, *why):
            """Closed with the last reference to it."""

        def get_slice(self, key):
            return CountingSlice(self._file.get_slice(key))

    class CountingSlice:
        def __init__(self, own):
            self._own, self.get_shape = own, own.get_shape

        def __getitem__(self, where):
            tensor = self._own[where]
            read.append(tensor.numel())
            return tensor

    monkeypatch.setattr(divided_loading, "safe_open", Counting)
    family = pipeline_class(checkpoint)
    plan = family.tensor_plans()["transformer"]
    loaded = load_divided(checkpoint, family, "transformer", plan, peers, dtype=torch.float32)
    with torch.no_grad():
        whole = type(loaded).from_pretrained(folder / "transformer")
    total = sum(tensor.numel() for tensor in whole.state_dict().values())
    divide(whole, plan, peers)
    expected = whole.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key])
        assert tensor.is_contiguous(), f"{key} would be multiplied by another kernel, with other bits"
    assert sum(read) == sum(tensor.numel() for tensor in expected.values()) < 0.75 * total


@torch.inference_mode()
def test_layers_in_host_memory_are_parts_too(tmp_path, kinds):
    folder = str(build_qwen_image(tmp_path / "model", size="small"))
    kind, peers = kinds["qwen_image"], Played(1, 2)
    family = pipeline_class(Checkpoint(folder))
    placed = {"dtype": torch.float32, "device": torch.device("cpu")}
    with own_group(peers):
        there, in_host = (family.load(folder, **placed, offloaded_bytes=size).transformer for size in (0, 2**30))
        assert in_host.transformer_blocks[0].in_host
        sequences = kind.draw(2)
        assert torch.equal(*(kind.forward(model, sequences)[0] for model in (there, in_host)))


@contextmanager
def own_group(group):
    """In it this process is in such a group."""
    use_group(group)
    try:
        yield
    finally:
        use_group(ALONE)


def test_parts_that_lie_side_by_side_are_divided_each():
    weight = torch.arange(20).expand(3, 20)  # 4 channels of attention, then 16 hidden ones
    share = Share(Outputs.SUMMED, parts=(1, 4))
    assert own_part(weight, share, Played(1, 2))[0].tolist() == [2, 3, *range(12, 20)]
    assert own_part(torch.arange(3), share, Played(1, 2)).tolist() == [0, 1, 2]


def test_channels_that_do_not_divide_are_shared_all_the_same_and_gathered_ones_are_not():
    parts = [own_part(torch.arange(7), Share(Outputs.OWN), Played(rank, 2)).tolist() for rank in range(2)]
    assert parts == [[0, 1, 2], [3, 4, 5, 6]]
    with pytest.raises(ConfigurationError, match="tensor_parallel_size=2 is not valid: a layer of the model has 7"):
        own_part(torch.arange(7), Share(Outputs.GATHERED), Played(0, 2))


def test_a_quantized_layer_is_divided_with_its_scales():
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.ModuleDict({"last": torch.nn.Linear(8, 6)})])})
    quantize_layers(model, "int8", torch.device("cpu"))
    for outputs, weight, scale in ((Outputs.OWN, (3, 8), (3,)), (Outputs.SUMMED, (6, 4), (6,))):
        part = copy.deepcopy(model)
        divide(part, {"blocks.*.last": Share(outputs)}, Played(0, 2))
        last = part["blocks"][0]["last"]
        own = getattr(last, "layer", last)
        assert (own.weight.shape, own.scale.shape) == (weight, scale)
        assert last.bias.shape == scale


def test_a_layer_of_another_kind_is_not_divided():
    model = torch.nn.ModuleDict({"last": torch.nn.Bilinear(8, 8, 8)})
    with pytest.raises(ConfigurationError, match="last is a Bilinear, which can't be divided"):
        divide(model, tensor_plan(own=["last"], summed=[]), Played(0, 2))


def test_weights_that_are_divided_otherwise_than_a_forward_are_not_used(kinds):
    kind = kinds["qwen_image"]
    model = copy.deepcopy(kind.model)
    divide(model, model.tensor_plan, Played(0, 2))
    with pytest.raises(RuntimeError, match="divided among 2 ranks, and 1 share this forward"), torch.inference_mode():
        kind.forward(model, kind.draw(1))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 4, 5, 16])
def test_sums_are_in_the_order_of_the_ranks(ranks, rows):
    torch.manual_seed(0)
    terms = [torch.randn(rows, 8) * 10.0 ** (3 * rank) for rank in range(ranks)]
    expected = terms[0]
    for term in terms[1:]:
        expected = expected + term
    for rank in range(ranks):
        assert torch.equal(add_up(Played(rank, ranks, terms), terms[rank]), expected)


def test_norms_span_what_all_ranks_have():
    torch.manual_seed(0)
    norms, whole = [torch.nn.RMSNorm(12, eps=1e-6) for _ in range(2)], [torch.randn(5, 12), torch.randn(3, 12)]
    for norm in norms:
        norm.weight.data.normal_()
    expected = rms_norms(norms, whole)
    squares = [torch.cat([x[:, rank * 6 : rank * 6 + 6].square().sum(dim=1) for x in whole])[None] for rank in range(2)]
    for rank in range(2):
        own = slice(rank * 6, rank * 6 + 6)
        parts = copy.deepcopy(norms)
        for norm in parts:
            norm.weight = torch.nn.Parameter(norm.weight[own], requires_grad=False)
        with together(Played(rank, 2, squares)):
            found = rms_norms(parts, [x[:, own] for x in whole])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other[:, own], rtol=0, atol=1e-6)


def test_ranks_remember_together_and_forget_together():
    """What one of them had kept of a failed forward and another had not would set them apart."""
    computed, times = [], torch.tensor([0.5])

    class Model:
        def __init__(self):
            self.modulations = ModulationCache()

        def compute_modulations(self, timesteps, dtype):
            computed.append(timesteps)
            return [Modulation([], torch.ones(1), torch.ones(1), 4) for _ in timesteps]

    model, group, beside = Model(), Played(0, 2), Played(0, 2)
    with own_group(group):
        for _ in range(2):
            modulations_at(model, times, times, torch.float32)
        assert len(computed) == 1
        with pytest.raises(ArithmeticError), together(group):
            raise ArithmeticError
        modulations_at(model, times, times, torch.float32)
        assert len(computed) == 2
        with together(beside):  # another thread's forward: what it remembers would be found on one rank and not on all
            modulations_at(model, torch.tensor([0.25]), times, torch.float32)
            modulations_at(model, torch.tensor([0.25]), times, torch.float32)
        assert computed[2:] == [[0.25], [0.25]]
