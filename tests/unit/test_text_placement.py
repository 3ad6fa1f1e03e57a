"""Which ranks encode which texts: where they are held already, where the work is, and where moving it pays."""

from msgspec import structs

from tests.toy_pipeline import toy_request
from vllm_cfg_plugin.engine import placement as placement_module
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.placement import Placement
from vllm_cfg_plugin.engine.plan import DECODED, SideReport
from vllm_cfg_plugin.engine.request import ScheduledRequest

IDLE = [0, 0]


def one_branch(id, prompt="a cat", cost=UNCALIBRATED, **fields):
    """A request of one branch, rank 0's."""
    request = ScheduledRequest(str(id), 0, id, toy_request(prompt, None, **fields), cost, 0.0)
    request.owners, request.asked, request.holders = (0,), [set()], [set()]
    return request


def held_by_rank_0(id, **fields):
    request = one_branch(id, **fields)
    request.asked, request.holders = [{0}], [{0}]
    return request


def test_a_single_branch_goes_to_the_least_busy_rank():
    """A request of one branch goes to the rank with least to do."""
    placement = Placement(3)
    assert placement.owners_of_newcomer(one_branch(0), [5, 3, 4]) == (1,)
    assert placement.owners_of_newcomer(one_branch(0), [5, 3, 3]) == (1,)


def test_an_encode_is_side_work_until_it_is_done():
    placement = Placement(2)
    assert not placement.has_side_work
    placement.first_encodes(one_branch(0))
    assert placement.has_side_work
    assert placement.decode(one_branch(1), IDLE).rank == 1, "rank 0 is encoding"
    placement.note_done(SideReport(0, 0, 0, 1.0))
    placement.note_done(SideReport(1, DECODED, 1, 1.0))
    assert not placement.has_side_work


def test_a_report_of_what_nobody_awaits_weighs_nothing():
    placement = Placement(2)
    placement.note_done(SideReport(0, DECODED, 1, 1.0))
    assert placement.decode(one_branch(1), IDLE).rank == 0, "of two idle ranks the first"


def test_a_text_is_encoded_on_its_owner_or_its_holder(monkeypatch):
    """A text is encoded on its owner and where one of the last texts is held."""
    monkeypatch.setattr(placement_module, "_REMEMBERED_PROMPTS", 2)
    placement = Placement(2)
    for id, prompt in enumerate(["a", "b", "a", "c"]):
        placement.note_encoded(SideReport(id, 0, 1, 1.0), one_branch(id, prompt))
    ranks = {
        prompt: [encode.rank for encode in placement.first_encodes(one_branch(9, prompt))] for prompt in ("a", "b", "c")
    }
    assert ranks == {"a": [0, 1], "b": [0], "c": [0, 1]}


def test_a_text_is_encoded_again_where_that_pays():
    """A text is encoded again on an idle rank if enough steps are left and no such encode is on its way."""
    cost = structs.replace(UNCALIBRATED, encode_us=5000)  # 50 steps of the branch that would move

    def running():
        return [held_by_rank_0(id, cost=cost, steps=60, image_tokens=95) for id in range(2)]

    assert Placement(2).level(running(), tick=20) == []
    placement, requests = Placement(2), running()
    (encode,) = placement.level(requests, tick=0)
    assert (encode.branch, encode.rank) == (0, 1)
    assert placement.level(requests, tick=0) == [], "what was asked for first changes what pays"


def test_no_levelling_gives_a_rank_more_tokens_than_it_may_have():
    def running():
        requests = [held_by_rank_0(id, image_tokens=95) for id in range(2)]
        for request in requests:
            request.holders = [{0, 1}]
        return requests

    placement = Placement(2, max_tokens=2 * one_branch(9, image_tokens=95).branch_tokens[0])
    placement.level(requests := running(), tick=0)
    assert {request.owners for request in requests} == {(0,), (1,)}
    newcomer = one_branch(9, image_tokens=195)
    newcomer.owners = (1,)
    placement.level(requests := running(), 0, [newcomer])
    assert [request.owners for request in requests] == [(0,), (0,)], "the newcomer needs rank 1 to itself"


def test_the_rank_with_the_text_encoders_encodes_for_all_and_decodes_nothing():
    placement, request = Placement(2, encoder_rank=0), one_branch(0)
    request.owners = (1,)
    (encode,) = placement.first_encodes(request)
    assert (encode.rank, encode.is_shared, request.asked) == (0, True, [{0, 1}])
    assert [placement.decode(one_branch(id), [0, 99]).rank for id in (1, 2)] == [1, 1]
    (encode,) = placement.first_encodes(one_branch(3))
    assert (encode.rank, encode.is_shared) == (0, False), "its owner encodes by itself"
    assert Placement(1, encoder_rank=None).decode(one_branch(4), [0]).rank == 0
