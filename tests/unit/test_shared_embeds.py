"""Text encoders on one rank alone: what it encoded reaches the others through the engine."""

import pytest
import torch

from tests.toy_pipeline import ToyPipeline, toy_request
from tests.unit.test_runner import make_runner, plan
from vllm_cfg_plugin.engine.batching import StepBatch
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.plan import Admission, Embeds, Encode, SideReport
from vllm_cfg_plugin.engine.step_result import StepResult
from vllm_cfg_plugin.pipelines.base import PromptEmbeds
from vllm_cfg_plugin.worker.embeds import pack_embeds, unpack_embeds

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_pooled", [True, False])
def test_embeddings_survive_the_way_bit_by_bit(dtype, has_pooled):
    embeds = PromptEmbeds(torch.randn(5, 8, dtype=dtype).t(), torch.randn(3, dtype=dtype) if has_pooled else None)
    again = unpack_embeds(pack_embeds(embeds).numpy().tobytes(), CPU)
    assert torch.equal(again.tokens, embeds.tokens)
    assert (again.pooled is None) is not has_pooled
    assert not has_pooled or torch.equal(again.pooled, embeds.pooled)


def test_a_rank_takes_over_what_another_one_encoded_and_says_so():
    pipeline = ToyPipeline()
    encoder, other = make_runner(pipeline, 0, 2), make_runner(pipeline, 1, 2)
    admit = [Admission(0, toy_request("a cat", "ugly"))]
    encodes = [Encode(0, 0, 0, is_shared=True), Encode(0, 1, 0)]
    for runner in (encoder, other):
        runner.run(plan(admit=admit, encodes=encodes, advance=False))
    assert encoder.side.shared.keys() == {(0, 0)}, "only what is asked for is shared"
    assert other.side.take() == []
    data = encoder.side.shared[0, 0]
    for runner in (encoder, other):
        runner.run(plan(advance=False, embeds=[Embeds(0, 0, (1,), data), Embeds(9, 0, (1,), data)]))
    assert [(report.id, report.branch, report.rank) for report in other.side.take()] == [(0, 0, 1)]
    held = [runner.states[0].prompt_embeds[0].tokens for runner in (encoder, other)]
    assert torch.equal(*held)


def test_what_one_rank_encoded_goes_with_the_next_plan_to_those_that_lack_it():
    batch = StepBatch(3, 8, 10**6, UNCALIBRATED, encoder_rank=0)
    batch.add("a", 0, toy_request("a cat", ["ugly", "dark"]))
    planned = batch.next_plan()
    assert [(encode.branch, encode.rank) for encode in planned.plan.encodes] == [(0, 0), (1, 0), (2, 0)]
    report = SideReport(0, 1, 0, 1.0)
    batch.note_side_report(report)
    batch.share_embeds(report, b"data")
    batch.share_embeds(SideReport(7, 1, 0, 1.0), b"of a request that has left")
    assert batch.next_plan().plan.embeds == [Embeds(0, 1, (1,), b"data")]
    batch.note_side_report(SideReport(0, 1, 1, 1.0))
    assert batch.known(0).holders[1] == {0, 1}
    assert batch.next_plan().plan.embeds == []


def test_ranks_that_were_started_anew_are_sent_nothing_of_before():
    batch = StepBatch(2, 8, 10**6, UNCALIBRATED, encoder_rank=0)
    batch.add("a", 0, toy_request())
    batch.next_plan()
    batch.note_side_report(SideReport(0, 1, 0, 1.0))
    batch.share_embeds(SideReport(0, 1, 0, 1.0), b"data")
    batch.start_over(has_killed=False)
    assert batch.next_plan().plan.embeds == []


def test_of_a_rank_of_several_processes_the_last_one_shares():
    batch = StepBatch(2, 8, 10**6, UNCALIBRATED, processes=2, encoder_rank=0)
    batch.add("a", 0, toy_request())
    batch.next_plan()
    for _ in range(2):
        batch.note_side_report(SideReport(0, 1, 0, 1.0))
        batch.share_embeds(SideReport(0, 1, 0, 1.0), b"data")
    assert batch.next_plan().plan.embeds == [Embeds(0, 1, (1,), b"data")]


def test_a_request_waits_until_its_owners_hold_what_another_rank_encoded():
    """Else the encoding rank would forward the others' branches for a step or two, whatever room it has."""
    spec = toy_request("a cat", "ugly")
    tokens = spec.sequence_tokens(0)
    batch = StepBatch(2, 8, tokens, UNCALIBRATED, encoder_rank=0)
    batch.add("a", 0, spec)
    planned = batch.next_plan()
    batch.note_result(planned, StepResult())
    for branch in (0, 1):
        batch.note_side_report(SideReport(0, branch, 0, 1.0))
    batch.share_embeds(SideReport(0, 1, 0, 1.0), b"data")
    planned = batch.next_plan()
    assert (planned.plan.embeds, planned.running) == ([Embeds(0, 1, (1,), b"data")], {})
    batch.note_side_report(SideReport(0, 1, 1, 1.0))
    (running,) = batch.next_plan().running
    assert running.owners == (0, 1)
