"""The rules that NCCL trusts its callers to keep: a broken one fails on every rank, and our collectives break none."""

import pytest
import torch

from tests.distributed.nccl_rules import BrokenRuleError
from tests.distributed.ranks import run_ranks
from vllm_cfg_plugin.distributed.parallel_state import get_cfg_group, initialize_model_parallel

pytestmark = pytest.mark.distributed

WAYS = {
    "another shape": lambda group, rank: group.all_gather(torch.zeros(1, 3 + rank), dim=0),
    "another dtype": lambda group, rank: group.all_gather(
        torch.zeros(1, 3, dtype=(torch.float, torch.half)[rank]), dim=0
    ),
    "another collective": lambda group, rank: (
        group.broadcast(torch.zeros(1, 3)) if rank else group.all_gather(torch.zeros(1, 3), dim=0)
    ),
    "not contiguous": lambda group, rank: group.broadcast(torch.zeros(4, 3).t()),
    "a dtype that NCCL lacks": lambda group, rank: group.broadcast(torch.zeros(3, dtype=torch.complex64)),
}


def break_rule(name):
    """`run_ranks` keeps the rules in all its ranks."""
    initialize_model_parallel(2)
    group = get_cfg_group()
    group.all_gather(torch.zeros(1, 3), dim=0)
    try:
        WAYS[name](group, group.rank_in_group)
    except BrokenRuleError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", WAYS)
def test_a_broken_rule_fails_on_every_rank(name):
    first, second = run_ranks(break_rule, 2, name)
    assert first == second
    assert first is not None
