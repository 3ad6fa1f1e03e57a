"""Tensor parallelism on four gloo ranks: every packed family's forward, and its calls with CFG-Parallel.

One start of four processes does all of it. How far from one process: 1e-5 of a prediction's scale, for sums are taken
in another order. But in any batch, and on every rank, its bits are the same.
"""

import copy

import pytest
import torch
from vllm.distributed.parallel_state import init_model_parallel_group

from tests.distributed.packed_kinds import packed_kinds, run_forked
from tests.families import FAMILIES, SEED, call, load
from vllm_cfg_plugin.distributed import parallel_state
from vllm_cfg_plugin.distributed.sequence_exchange import CollectiveGroup, Coordinators, connect_sequence_group
from vllm_cfg_plugin.distributed.sequence_group import MemberFailedError, together
from vllm_cfg_plugin.pipelines.common.tensor_parallel import divide, is_divided
from vllm_cfg_plugin.pipelines.quantized import quantize_layers
from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline

pytestmark = pytest.mark.distributed

RANKS = 4
COUNT = 6
TOLERANCE = 1e-5
PAIRS, ALL = [[0, 1], [2, 3]], [[0, 1, 2, 3]]
# label -> (all that share a forward, those that share its rows, those that share its weights)
MESHES = {"tp2": (PAIRS, None, PAIRS), "tp4": (ALL, None, ALL), "sp2 tp2": (ALL, [[0, 2], [1, 3]], PAIRS)}


def work(rank, kinds, sequences, folders):
    """(mesh, kind) -> what a pack of sequences gave, and each of them alone; family -> the latents of a call."""
    results = {}
    with torch.inference_mode():
        for label, (everybody, rows, weights) in MESHES.items():
            coordinators = Coordinators(_connect(everybody, rank), _connect(rows, rank), _connect(weights, rank))
            group = connect_sequence_group(coordinators)
            for name, kind in kinds.items():
                model = copy.deepcopy(kind.model)
                divide(model, model.tensor_plan, group.tensor)
                results[label, name] = _forward(group, kind, model, sequences[name])
            results[label, "collectives"] = _forward(CollectiveGroup(coordinators), kind, model, sequences[name])
            results[label, "failure"] = _fail(group, rank, kind, model, sequences[name])
            results[label, "after failure"] = _forward(group, kind, model, sequences[name])
    parallel_state.initialize_model_parallel(cfg_parallel_size=2, tensor_parallel_size=2)
    for family in FAMILIES:
        pipeline = load(folders[family.label])
        assert is_divided(pipeline.transformer)
        results[family.label] = call(pipeline, family.cases[0], SEED)
    # As a script does it: diffusers loads all of the weights.
    pipeline = QwenImagePipeline.from_pretrained(folders[FAMILIES[0].label])
    assert is_divided(pipeline.transformer)
    results["from_pretrained"] = call(pipeline, FAMILIES[0].cases[0], SEED)
    parallel_state.destroy_model_parallel()
    return results


def _fail(group, rank, kind, model, sequences):
    """What is raised where rank 1 fails between two exchanges of a forward."""

    def stop(module, args):
        raise ArithmeticError("out of luck")

    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    hook = layers[len(layers) // 2].register_forward_pre_hook(stop) if rank == 1 else None
    try:
        with together(group):
            kind.forward(model, sequences)
    except (MemberFailedError, ArithmeticError) as error:
        return type(error).__name__
    finally:
        if hook is not None:
            hook.remove()


def _connect(groups, rank):
    return None if groups is None else init_model_parallel_group(groups, rank, "gloo", group_name="tensor")


def _forward(group, kind, model, sequences):
    with together(group):
        packed = kind.forward(model, sequences)
        alone = [kind.forward(model, [sequence])[0] for sequence in sequences]
    return packed, alone


@pytest.fixture(scope="module")
def kinds():
    kinds = packed_kinds()
    quantized = copy.deepcopy(kinds["qwen_image"].model)
    quantize_layers(quantized, "int8", torch.device("cpu"))
    return {"int8": kinds["qwen_image"]._replace(model=quantized)} | kinds


@pytest.fixture(scope="module")
def sequences(kinds):
    return {name: kind.draw(COUNT) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family.label: family.build(tmp_path_factory.mktemp("family") / "model") for family in FAMILIES}


@pytest.fixture(scope="module")
def results(kinds, sequences, folders):
    torch.set_num_threads(1)
    return run_forked(work, RANKS, kinds, sequences, folders)


@pytest.fixture(scope="module")
def packs(results, kinds):
    """Of every rank (mesh, kind) -> predictions of a pack, and of each of its sequences alone."""
    return [
        {(m, n): found[m, n] for m in MESHES for n in (*kinds, "collectives", "after failure")} for found in results
    ]


def bitwise(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def test_predictions_are_those_of_one_process(results, kinds, sequences):
    for name, kind in kinds.items():
        with torch.inference_mode():
            expected = kind.forward(kind.model, sequences[name])
        for label in MESHES:
            packed, _ = results[0][label, name]
            worst = max((one - other).abs().max().item() for one, other in zip(packed, expected, strict=True))
            assert worst <= TOLERANCE, (label, name)


def test_a_sequence_does_not_depend_on_its_pack(packs):
    assert [key for key, found in packs[0].items() if not bitwise(*found)] == []


def test_all_ranks_have_the_same_bits(packs):
    for rank in range(1, RANKS):
        assert [key for key, found in packs[rank].items() if not bitwise(found[0], packs[0][key][0])] == []


def test_sharing_rows_too_changes_no_bit(packs, kinds):
    assert [name for name in kinds if not bitwise(packs[0]["sp2 tp2", name][0], packs[0]["tp2", name][0])] == []


@pytest.mark.parametrize("what", ["collectives", "after failure"])
def test_torchs_collectives_and_a_group_after_a_failure_give_the_same_bits(packs, kinds, what):
    last = [*kinds][-1]
    assert [mesh for mesh in MESHES if not bitwise(packs[0][mesh, what][0], packs[0][mesh, last][0])] == []


def test_a_rank_that_fails_in_a_forward_leaves_nobody_waiting(results):
    failed, told = "ArithmeticError", "MemberFailedError"
    assert [found["tp4", "failure"] for found in results] == [told, failed, told, told]
    assert [found["sp2 tp2", "failure"] for found in results] == [told, failed, told, told]
    assert [found["tp2", "failure"] for found in results] == [told, failed, None, None]


def test_calls_with_cfg_parallel_too_are_those_of_one_rank(results, folders):
    for family in FAMILIES:
        expected = call(load(folders[family.label]), family.cases[0], SEED)
        found = [rank[family.label] for rank in results]
        assert all(torch.equal(latents, found[0]) for latents in found), family.label
        assert (found[0] - expected).abs().max() <= TOLERANCE * expected.abs().max(), family.label
    assert FAMILIES[0].class_name == QwenImagePipeline.__name__
    assert all(torch.equal(rank["from_pretrained"], rank[FAMILIES[0].label]) for rank in results)
