"""Pipelines that run as diffusers' own, on real gloo ranks: bitwise the same on one rank and two, alone and beside."""

import msgspec
import pytest
import torch

from tests.any_pipelines import ANY_PIPELINES, IN_A_ROW, MASKED
from tests.distributed.engine_ranks import run_models
from tests.families import SEED, call

pytestmark = pytest.mark.distributed

COMPARED = [family for family in ANY_PIPELINES if family.class_name not in MASKED]
OTHER = 50  # added to the seed of each case for a request that runs beside it


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family.class_name: family.build(folder / family.class_name) for family in ANY_PIPELINES}


@pytest.fixture(scope="module")
def traces(folders, tmp_path_factory):
    """{ranks: rank 0's {folder: {script: {seed: latents after each step}}}}: each case alone, and all of a class."""
    models = {}
    for family in ANY_PIPELINES:
        requests = family.requests(folders[family.class_name])
        others = [msgspec.structs.replace(request, seed=request.seed + OTHER) for request in requests]
        scripts = {f"alone-{request.seed}": [(0, request)] for request in requests}
        scripts["mixed"] = [(i, request) for i, request in enumerate([*others, *requests])]
        models[folders[family.class_name]] = scripts
    return {ranks: run_models(models, ranks, tmp_path_factory.mktemp("traces"))[0] for ranks in (1, 2)}


@pytest.mark.parametrize("family", ANY_PIPELINES, ids=lambda family: family.class_name)
def test_alone_beside_others_and_on_two_ranks_latents_are_equal(family, folders, traces):
    one, two = (traces[ranks][folders[family.class_name]] for ranks in (1, 2))
    for i, case in enumerate(family.cases):
        seed = SEED + i
        expected = one[f"alone-{seed}"][seed]
        assert len(expected) > 1
        for trace in (one["mixed"][seed], two[f"alone-{seed}"][seed], two["mixed"][seed]):
            assert all(torch.equal(a, b) for a, b in zip(trace, expected, strict=True)), case.mode


@pytest.mark.parametrize("family", COMPARED, ids=lambda family: family.class_name)
def test_final_latents_are_those_of_diffusers(family, folders, traces):
    torch.set_num_threads(1)
    reference = family.reference(folders[family.class_name])
    for i, case in enumerate(family.cases):
        expected = call(reference, case, SEED + i)
        latents = traces[2][folders[family.class_name]]["mixed"][SEED + i][-1]
        assert expected.std() > 0.1, case.mode
        if family.class_name in IN_A_ROW:
            assert torch.equal(latents, expected), case.mode
        difference = family.difference(latents, expected)
        assert difference <= family.tolerance, f"{case.mode} differs by {difference}"
