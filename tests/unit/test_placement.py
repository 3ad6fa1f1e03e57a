"""What the placement remembers between steps: how much side work each rank has, and who holds which text."""

from tests.toy_pipeline import toy_request
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.placement import Placement
from vllm_cfg_plugin.engine.plan import DECODED, SideReport
from vllm_cfg_plugin.engine.request import ScheduledRequest

IDLE = [0, 0]


def scheduled(id, **fields):
    return ScheduledRequest(str(id), 0, id, toy_request(**fields), UNCALIBRATED, 0.0)


def test_decodes_go_to_the_rank_with_the_least_side_work_that_is_not_yet_done():
    placement, requests = Placement(2), [scheduled(id) for id in range(5)]
    assert [placement.decode(request, IDLE).rank for request in requests[:2]] == [0, 1]
    placement.note_done(SideReport(1, DECODED, 1, 0.0))
    assert placement.decode(requests[2], IDLE).rank == 1, "rank 1 is free again"
    placement.forget(requests[0])
    assert placement.decode(requests[3], [1, 0]).rank == 0, "what was cancelled weighs nothing"
    assert placement.decode(requests[4], [1, 0]).rank == 1, "and of equal backlogs the less loaded rank"
