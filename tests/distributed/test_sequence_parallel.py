"""Sequence parallelism on four gloo ranks: every packed family's forward, and its calls with CFG-Parallel, bit for bit.

One start of four processes does all of it; they are forked, with the models and what one process makes of them.
"""

import multiprocessing
import queue
import traceback
from functools import partial

import pytest
import torch
from vllm.distributed import init_distributed_environment
from vllm.distributed.parallel_state import init_model_parallel_group
from vllm.utils.network_utils import get_open_port

from tests.families import FAMILIES, SEED, call, load
from tests.model_builders import qwen_image, z_image
from tests.model_builders.mmdit import flux_transformer, longcat_image_transformer, sd3_transformer
from tests.model_builders.qwen_image import SIZES
from tests.model_builders.wan import ModelSize, wan_transformer
from tests.unit import test_qwen_image_transformer as qwen_image_checks
from tests.unit import test_wan_transformer as wan_checks
from tests.unit import test_z_image_transformer as z_image_checks
from tests.unit.adapter_checks import draw_carried
from tests.unit.test_flux_transformer import TestPackedFlux as FluxChecks
from tests.unit.test_longcat_image_transformer import TestPackedLongCatImage as LongCatImageChecks
from tests.unit.test_sd3_transformer import VERSIONS
from tests.unit.test_sd3_transformer import TestPackedSD3 as SD3Checks
from vllm_cfg_plugin.distributed import parallel_state
from vllm_cfg_plugin.distributed.sequence_exchange import CollectiveGroup, connect_sequence_group
from vllm_cfg_plugin.distributed.sequence_group import MemberFailedError, together
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.adapters import carrying
from vllm_cfg_plugin.pipelines.common.heads import all_rows_of_own_heads
from vllm_cfg_plugin.pipelines.flux.transformer import PackedFluxTransformer
from vllm_cfg_plugin.pipelines.longcat_image.transformer import PackedLongCatImageTransformer
from vllm_cfg_plugin.pipelines.qwen_image.transformer import PackedQwenImageTransformer
from vllm_cfg_plugin.pipelines.sd3.transformer import PackedSD3Transformer
from vllm_cfg_plugin.pipelines.wan.transformer import PackedWanTransformer
from vllm_cfg_plugin.pipelines.z_image.transformer import PackedZImageTransformer

pytestmark = pytest.mark.distributed

RANKS = 4
TIMEOUT_S = 240
SMALL = SIZES["small"]  # it has four heads, so each of four ranks has one
SIZES_OF_GROUPS = {"2": [[0, 1], [2, 3]], "4": [[0, 1, 2, 3]]}


def make_forwards():
    """(packed transformer, sequences in its pack) -> function that gives their predictions."""
    torch.manual_seed(0)
    qwen = PackedQwenImageTransformer.adopt(qwen_image.transformer(SMALL))
    z = PackedZImageTransformer.adopt(z_image.transformer(SMALL))
    kinds = {
        "qwen_image": (partial(qwen_image_checks.forward_packed, qwen), qwen_image_checks.draw_sequences),
        "z_image": (partial(z_image_checks.forward, z), z_image_checks.draw_sequences),
    }
    for name, checks, model in (
        ("flux", FluxChecks(), PackedFluxTransformer.adopt(flux_transformer(SMALL))),
        ("longcat_image", LongCatImageChecks(), PackedLongCatImageTransformer.adopt(longcat_image_transformer(SMALL))),
        ("sd3.5", SD3Checks(), PackedSD3Transformer.adopt(sd3_transformer(SMALL, **VERSIONS["3.5"]))),
    ):
        kinds[name] = partial(checks.forward, model), partial(checks.draw, seed=1)
        kinds[f"{name}, adapters"] = adapted(model, partial(checks.forward, model)), partial(checks.draw, seed=2)
    for kind, options in wan_checks.KINDS.items():
        packed = PackedWanTransformer.adopt(wan_transformer(ModelSize(heads=4), **options))
        models = wan_checks.Models(packed, packed, kind)
        kinds[f"wan {kind}"] = models.forward_packed, models.draw
    return {(name, count): partial(forward, draw(count)) for name, (forward, draw) in kinds.items() for count in (1, 6)}


def adapted(model, forward):
    """The forward of sequences that carry adapters, the last of them one and of six the first none."""
    carried = draw_carried(model, modulating=True)

    def forward_carrying(sequences):
        with carrying(carried[-len(sequences) :]):
            return forward(sequences)

    return forward_carrying


def work(rank, port, forwards, expected, pipelines, answers):
    """Everything that the tests look at: name -> whether it is as one process has it, or what was raised."""
    torch.set_num_threads(1)
    results = {}
    try:
        init_distributed_environment(RANKS, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
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
        answers.put((rank, results, None))
    except BaseException:
        answers.put((rank, results, traceback.format_exc()))


def _try_forwards(rank, forwards, expected, results):
    for label, members in SIZES_OF_GROUPS.items():
        coordinator = init_model_parallel_group(members, rank, "gloo", group_name=f"sequence{label}")
        group = connect_sequence_group(coordinator)
        for key, forward in forwards.items():
            results[*key, label] = _is_same(group, forward, expected[key])
        key = "qwen_image", 6
        results["collectives", label] = _is_same(CollectiveGroup(coordinator), forwards[key], expected[key])
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
    return run_forked(forwards, expected, pipelines)


def run_forked(*args):
    context = multiprocessing.get_context("fork")
    answers, port = context.Queue(), get_open_port()
    processes = [context.Process(target=work, args=(rank, port, *args, answers), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    collected = {}
    try:
        while len(collected) < RANKS:
            rank, found, error = answers.get(timeout=TIMEOUT_S)
            assert error is None, f"rank {rank} raised:\n{error}"
            collected[rank] = found
    except queue.Empty:
        raise AssertionError(f"only ranks {sorted(collected)} finished in {TIMEOUT_S} s") from None
    finally:
        for process in processes:
            process.join(timeout=10 if len(collected) == RANKS else 0)
            process.kill()
    return [collected[rank] for rank in range(RANKS)]


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
