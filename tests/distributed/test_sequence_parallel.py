"""Sequence parallelism on four gloo ranks: every packed family's forward, and its calls with CFG-Parallel, bit for bit.

One start of four processes does all of it; they are forked, with the models and what one process makes of them.
"""

from functools import partial

import pytest
import torch
from vllm.distributed.parallel_state import init_model_parallel_group

from tests.distributed.packed_kinds import packed_kinds, run_forked
from tests.families import FAMILIES, SEED, call, load
from tests.unit import test_wan_transformer as wan_checks
from tests.unit.adapter_checks import draw_carried
from vllm_cfg_plugin.distributed import parallel_state
from vllm_cfg_plugin.distributed.sequence_exchange import CollectiveGroup, Coordinators, connect_sequence_group
from vllm_cfg_plugin.distributed.sequence_group import MemberFailedError, together
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.adapters import carrying
from vllm_cfg_plugin.pipelines.common.heads import all_rows_of_own_heads

pytestmark = pytest.mark.distributed

RANKS = 4
SIZES_OF_GROUPS = {"2": [[0, 1], [2, 3]], "4": [[0, 1, 2, 3]]}


def make_forwards():
    """(packed transformer, sequences in its pack) -> function that gives their predictions."""
    kinds = packed_kinds()
    for name in ("flux", "longcat_image", "sd3.5"):
        kind = kinds[name]
        kinds[f"{name}, adapters"] = kind._replace(forward=adapted(kind))
    return {
        (name, count): partial(kind.forward, kind.model, kind.draw(count))
        for name, kind in kinds.items()
        for count in (1, 6)
    }


def adapted(kind):
    """The forward of sequences that carry adapters, the last of them one and of six the first none."""
    carried = draw_carried(kind.model, modulating=True)

    def forward_carrying(model, sequences):
        with carrying(carried[-len(sequences) :]):
            return kind.forward(model, sequences)

    return forward_carrying


def work(rank, forwards, expected, pipelines):
    """Everything that the tests look at: name -> whether it is as one process has it, or what was raised."""
    results = {}
    with torch.inference_mode():
        _try_forwards(rank, forwards, expected, results)
    parallel_state.initialize_model_parallel(cfg_parallel_size=2, sequence_parallel_size=2)
    for name, (pipeline, cases) in pipelines.items():
        for i, case in enumerate(cases):
            latents = call(pipeline, case, SEED + i)
            results[name, case.mode] = torch.equal(latents, expected[name, case.mode])
    pipeline, (case, *_) = pipelines["QwenImagePipeline"]
    results["no seed"] = pipeline(case.prompt, **case.params, output_type="latent").images.flatten()[:9].tolist()
    parallel_state.destroy_model_parallel()
    return results


def _try_forwards(rank, forwards, expected, results):
    for label, members in SIZES_OF_GROUPS.items():
        coordinator = init_model_parallel_group(members, rank, "gloo", group_name=f"sequence{label}")
        group = connect_sequence_group(coordinators := Coordinators(coordinator, sequence=coordinator))
        for key, forward in forwards.items():
            results[*key, label] = _is_same(group, forward, expected[key])
        key = "qwen_image", 6
        results["collectives", label] = _is_same(CollectiveGroup(coordinators), forwards[key], expected[key])
        results["failure", label] = _fail(group, forwards[key])
        results["after failure", label] = _is_same(group, forwards[key], expected[key])


def _is_same(group, forward, expected):
    with together(group):
        predictions = forward()
    return all(torch.equal(one, other) for one, other in zip(predictions, expected, strict=True))


def _fail(group, forward):
    """What is raised where the group's last rank fails and the others are in the midst of a forward."""
    try:
        with together(group):
            if group.rank == group.size - 1:
                raise ArithmeticError("out of luck")
            forward()
    except (MemberFailedError, ArithmeticError) as error:
        return type(error).__name__


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of every rank what `work` found."""
    torch.set_num_threads(1)
    forwards = make_forwards()
    pipelines = {}
    expected = {}
    with torch.inference_mode():
        expected |= {key: forward() for key, forward in forwards.items()}
    for family in FAMILIES:
        pipeline = load(family.build(tmp_path_factory.mktemp("family") / "model"))
        pipelines[family.label] = pipeline, family.cases[:1]
        for i, case in enumerate(family.cases[:1]):
            expected[family.label, case.mode] = call(pipeline, case, SEED + i)
    return run_forked(work, RANKS, forwards, expected, pipelines)


def test_forwards_are_bitwise_those_of_one_rank(results):
    keys = [key for key in results[0] if len(key) == 3]
    assert len(keys) == len(SIZES_OF_GROUPS) * 2 * (8 + len(wan_checks.KINDS))
    assert [(key, rank) for key in keys for rank, found in enumerate(results) if found[key] is not True] == []


def test_calls_with_cfg_parallel_too_are_those_of_one_rank(results):
    keys = [(family.label, family.cases[0].mode) for family in FAMILIES]
    assert [(key, rank) for key in keys for rank, found in enumerate(results) if found[key] is not True] == []


def test_without_a_seed_all_ranks_draw_the_same(results):
    assert all(found["no seed"] == results[0]["no seed"] for found in results)


def test_torchs_collectives_give_the_same_bits(results):
    assert all(found["collectives", label] for found in results for label in SIZES_OF_GROUPS)


def test_a_rank_that_fails_in_a_forward_leaves_nobody_waiting(results):
    assert all(found["after failure", label] for found in results for label in SIZES_OF_GROUPS)
    assert [found["failure", "4"] for found in results] == [*3 * ["MemberFailedError"], "ArithmeticError"]
    assert [found["failure", "2"] for found in results] == 2 * ["MemberFailedError", "ArithmeticError"]


def test_heads_that_cannot_be_shared_are_refused():
    class Three:
        rank, size = 0, 3

    with pytest.raises(ConfigurationError, match="sequence_parallel_size=3 is not valid: it must divide the 4"):
        all_rows_of_own_heads(Three(), [torch.zeros(16, 4, 8)])
