"""What the placement remembers between steps: how much side work each rank has, and who holds which text."""

import pytest

from tests.toy_pipeline import toy_request
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.placement import Placement
from vllm_cfg_plugin.engine.plan import DECODED, FORWARDED, SideReport
from vllm_cfg_plugin.engine.request import ScheduledRequest

IDLE = [0, 0]


def scheduled(id, **fields):
    return ScheduledRequest(str(id), 0, id, toy_request(**fields), UNCALIBRATED, 0.0)


def test_decodes_go_to_the_rank_with_least_side_work():
    """Decodes go to the rank with the least side work that is not yet done."""
    placement, requests = Placement(2), [scheduled(id) for id in range(5)]
    assert [placement.decode(request, IDLE).rank for request in requests[:2]] == [0, 1]
    placement.note_done(SideReport(1, DECODED, 1, 0.0))
    assert placement.decode(requests[2], IDLE).rank == 1, "rank 1 is free again"
    placement.forget(requests[0])
    assert placement.decode(requests[3], [1, 0]).rank == 0, "what was cancelled weighs nothing"
    assert placement.decode(requests[4], [1, 0]).rank == 1, "and of equal backlogs the less loaded rank"


def test_a_short_decode_prefers_a_rank_without_long_ones():
    """A short decode waits for no long one but prefers a rank without."""
    placement = Placement(2, max_side_us=50)
    longs = [placement.decode(scheduled(id, image_tokens=1000), IDLE) for id in range(2)]
    assert [(long.rank, long.is_long) for long in longs] == [(0, True), (1, True)]
    placement.note_done(SideReport(1, DECODED, 1, 0.0))
    shorts = [placement.decode(scheduled(id, image_tokens=10), IDLE) for id in range(2, 6)]
    assert [(short.rank, short.is_long) for short in shorts] == [(1, False), (0, False), (1, False), (1, False)]


def test_a_long_decode_waits_for_the_short_ones_too():
    placement = Placement(2, max_side_us=50)
    assert placement.decode(scheduled(0, image_tokens=10), IDLE).rank == 0
    long = placement.decode(scheduled(1, image_tokens=1000), IDLE)
    assert (long.rank, long.is_long) == (1, True)


def test_long_forwards_are_awaited_from_each_owner():
    """Long forwards are awaited from each owner until they are done or forgotten."""
    placement, request = Placement(2), scheduled(0)
    request.owners = (0, 1)
    assert placement.forward(request).owners == (0, 1)
    placement.note_done(SideReport(0, FORWARDED, 1, 0.0))
    assert placement.has_side_work
    placement.forget(request)
    assert not placement.has_side_work
    assert placement.decode(scheduled(1), IDLE).rank == 0, "nothing of it weighs any more"


def test_the_work_of_a_group_is_done_when_all_of_it_say_so():
    placement, request = Placement(2, processes=2), scheduled(0)
    request.owners = (0, 1)
    placement.forward(request)
    assert [placement.note_done(SideReport(0, FORWARDED, rank, 0.0)) for rank in (0, 1, 0, 1)] == [
        False,
        False,
        True,
        True,
    ]
    assert not placement.has_side_work
    decode = placement.decode(scheduled(1), IDLE)
    assert placement.note_done(SideReport(1, DECODED, decode.rank, 0.0)), "one process decodes"


def test_one_process_that_fails_is_enough():
    placement, request = Placement(1, processes=3), scheduled(0)
    request.owners = (0, 0)
    placement.forward(request)
    assert placement.note_done(SideReport(0, FORWARDED, 0, 0.0, "out of luck"))
    assert not placement.has_side_work


@pytest.mark.parametrize(("text", "condition", "is_long"), [("a", 0, False), ("a" * 60, 0, True), ("a", 60, True)])
def test_a_long_text_or_many_images_make_an_encode_a_long_one(text, condition, is_long):
    request = scheduled(0, prompt=text, negative=None, condition_tokens=condition)
    request.owners, request.asked = (0,), [set()]
    assert [encode.is_long for encode in Placement(2, max_side_us=50).first_encodes(request)] == [is_long]
