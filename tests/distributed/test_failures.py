"""One request's failure on real gloo ranks: whichever hook fails, on one rank or on all, nobody else notices."""

import msgspec
import pytest
import torch
import torch.distributed as dist

from tests.distributed.engine_ranks import run_ranks
from tests.toy_pipeline import UNLUCKY_HOOKS, UnluckyPipeline, toy_request
from vllm_cfg_plugin.params import ImageInput

pytestmark = pytest.mark.distributed

UNLUCKY = [f"{hook}{where}" for hook in sorted(UNLUCKY_HOOKS) for where in ("", " on rank 1")]


def make_request(prompt, seed):
    image = ImageInput(prompt, "RGB", 1, 1, b"\x03\x00\x00")
    return msgspec.structs.replace(toy_request(prompt, seed=seed), images=[image])


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """{name of what fails: each rank's {seed: latents after each step}}"""
    early, late = make_request("a cat", 1), make_request("a dog", 3)
    scripts = {unlucky: [(0, early), (0, make_request(unlucky, 2)), (1, late)] for unlucky in UNLUCKY}
    scripts["nothing"] = [(0, early), (1, late)]
    by_rank = run_ranks(
        None, 2, scripts, tmp_path_factory.mktemp("traces"), load=lambda _: UnluckyPipeline(dist.get_rank())
    )
    return {name: [by_script[name] for by_script in by_rank] for name in scripts}


@pytest.mark.parametrize("unlucky", UNLUCKY)
def test_a_hook_that_fails_costs_its_request_alone(traces, unlucky):
    expected = traces["nothing"][0]
    for by_seed in traces[unlucky]:
        assert len(by_seed.get(2, [])) < 3, "what failed takes no last step on any rank"
        for seed, latents in expected.items():
            assert len(by_seed[seed]) == 3
            assert torch.equal(torch.stack(by_seed[seed]), torch.stack(latents))
