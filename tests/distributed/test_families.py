"""Every family on real gloo ranks: bitwise the same alone, among others, on one rank or two, and like diffusers."""

import msgspec
import pytest
import torch

from tests.contract import generate
from tests.distributed.engine_ranks import run_ranks
from tests.distributed.ranks import run_ranks as run_direct
from tests.families import FAMILIES, SEED, STEPS, call, load
from vllm_cfg_plugin.params import StepCache

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.label)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return family.build(tmp_path_factory.mktemp("family") / "model")


def with_caches(requests):
    """The same requests with caches of steps, each with the next one of some, and with other seeds."""
    caches = (StepCache(order=1), StepCache(interval=3), StepCache(order=2, range=(0.0, 0.9)))
    return [
        msgspec.structs.replace(request, seed=request.seed + 50, cache=cache)
        for request, cache in zip(requests, caches, strict=False)
    ]


@pytest.fixture(scope="module")
def traces(family, folder, tmp_path_factory):
    """{ranks: rank 0's {script: {seed: latents after each step}}}: each case alone, and all, joining one by one."""
    requests = family.requests(folder)
    scripts = {f"alone-{request.seed}": [(0, request)] for request in requests}
    cached = with_caches(requests)
    scripts |= {f"alone-{request.seed}": [(0, request)] for request in cached}
    scripts["mixed"] = [(2 * i, request) for i, request in enumerate(requests)]
    scripts["cached among others"] = [(i, request) for i, request in enumerate([*requests, *cached])]
    return {ranks: run_ranks(folder, ranks, scripts, tmp_path_factory.mktemp("traces"))[0] for ranks in (1, 2)}


def test_latents_are_equal_alone_among_others_on_two_ranks(family, traces):
    """Alone among others and on two ranks the latents are bitwise equal."""
    for i, case in enumerate(family.cases):
        seed = SEED + i
        expected = traces[1][f"alone-{seed}"][seed]
        assert len(expected) == case.params.get("num_inference_steps", STEPS)
        for trace in (traces[1]["mixed"][seed], traces[2][f"alone-{seed}"][seed], traces[2]["mixed"][seed]):
            assert all(torch.equal(one, other) for one, other in zip(trace, expected, strict=True)), case.mode


def test_cached_requests_depend_on_themselves_alone(folder, family, traces):
    """With a cache of steps too: alone, among others, on two ranks and in a direct call the same bits, and others."""
    torch.set_num_threads(1)
    pipeline, plain = load(folder), family.requests(folder)
    for request, uncached in zip(with_caches(plain), plain, strict=True):
        expected = traces[1][f"alone-{request.seed}"][request.seed]
        others = [traces[2][f"alone-{request.seed}"], *(traces[ranks]["cached among others"] for ranks in (1, 2))]
        for trace in others:
            assert bitwise_equal(trace[request.seed], expected)
        assert torch.equal(generate(pipeline, request), expected[-1])
        without = msgspec.structs.replace(request, cache=None)
        assert not torch.equal(generate(pipeline, without), expected[-1]), "the cache does nothing"
        among = traces[2]["cached among others"][uncached.seed]
        assert bitwise_equal(among, traces[1][f"alone-{uncached.seed}"][uncached.seed])


def bitwise_equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_final_latents_are_those_of_diffusers(family, folder, traces):
    torch.set_num_threads(1)
    reference, ours = family.reference(folder), load(folder)
    for i, (case, request) in enumerate(zip(family.cases, family.requests(folder), strict=True)):
        expected = call(reference, case, SEED + i)
        latents = family.to_reference(ours, traces[2]["mixed"][SEED + i][-1], request)
        assert expected.std() > 0.1, case.mode
        difference = (latents - expected).abs().max().item()
        assert difference <= family.tolerance, f"{case.mode} differs by {difference}"


def _call_directly(folder, cases):
    """Every case by a direct call, as under torchrun."""
    from vllm_cfg_plugin.distributed import get_classifier_free_guidance_world_size, initialize_model_parallel

    initialize_model_parallel(cfg_parallel_size=2)
    assert get_classifier_free_guidance_world_size() == 2
    pipeline = load(folder)
    return [call(pipeline, case, SEED + i).numpy() for i, case in enumerate(cases)]


def test_a_direct_call_under_torchrun_gives_the_engines_latents(family, folder, traces):
    ours, requests = load(folder), family.requests(folder)
    for by_case in run_direct(_call_directly, 2, folder, family.cases):
        for case, request, latents in zip(family.cases, requests, by_case, strict=True):
            expected = family.to_reference(ours, traces[1][f"alone-{request.seed}"][request.seed][-1], request)
            assert torch.equal(torch.from_numpy(latents), expected), case.mode
