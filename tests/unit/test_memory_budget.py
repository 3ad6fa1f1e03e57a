"""The second budget beside time: so many tokens a step as a GPU's memory has room for."""

import math

import msgspec
import pytest

from tests.toy_pipeline import ToyPipeline, toy_request, toy_vllm_config
from tests.unit.fakes import INFO
from vllm_cfg_plugin.config import FIND_TOKEN_BUDGET
from vllm_cfg_plugin.engine.calibration import Calibration, MemoryCost, keep_calibration, slowest, token_budget
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.placement import Placement
from vllm_cfg_plugin.engine.request import ScheduledRequest
from vllm_cfg_plugin.worker import calibration as measuring

MEMORY = MemoryCost(step_bytes=1000, token_bytes=10, decode_bytes=4000, decode_token_bytes=100)


def calibration(**fields):
    return Calibration(cost=UNCALIBRATED, token_budget=500, default_tokens=50, memory=MEMORY, **fields)


@pytest.mark.parametrize(
    ("room", "asked", "budget"),
    [
        (None, FIND_TOKEN_BUDGET, 500),
        (10**6, FIND_TOKEN_BUDGET, 500),
        (7000, FIND_TOKEN_BUDGET, 200),
        (7000, 300, 200),
        (7000, 100, 100),
        (0, FIND_TOKEN_BUDGET, 50),
    ],
)
def test_a_step_has_no_more_tokens_than_there_is_room_for(room, asked, budget):
    config = toy_vllm_config(max_num_batched_tokens=asked)
    keep_calibration(config, calibration(room=room))
    assert token_budget(config) == budget


@pytest.mark.parametrize(("room", "tokens"), [(None, math.inf), (10_000, 95), (5500, 50), (0, 50)])
def test_images_too_large_to_be_decoded_beside_a_step_are_decoded_in_tiles(room, tokens):
    """A decode that runs out of memory may take a step's with it."""
    most = calibration(room=room).decode_tokens_with_room
    assert most == tokens
    placement = Placement(2, max_decode_tokens=most)
    for image_tokens in (50, 60, 95, 96):
        request = scheduled(image_tokens)
        is_tiled = image_tokens > tokens
        assert placement.decode(request, [0, 0]).is_tiled == is_tiled
        assert placement.preview(request, [0, 0]).is_tiled == is_tiled


def scheduled(image_tokens):
    return ScheduledRequest("a", 0, 0, toy_request(image_tokens=image_tokens), UNCALIBRATED, 0.0)


def test_the_rank_with_the_least_room_counts():
    merged = slowest([calibration(room=9000), calibration(room=7000)])
    assert (merged.room, merged.memory) == (7000, MEMORY)
    assert slowest([msgspec.structs.replace(calibration(), memory=None)]).memory is None


class CountedMemory:
    """A GPU's memory where a toy pipeline takes 100 bytes, and 7 for each token that it works on."""

    tokens = 0

    def begin(self):
        CountedMemory.tokens = 0

    def peak(self):
        return 100 + 7 * CountedMemory.tokens


def test_what_a_token_takes_of_a_gpu_is_measured_beside_its_time(monkeypatch):
    class Pipeline(ToyPipeline):
        def __init__(self):
            super().__init__()
            self.transformer.fail = lambda sequences: self._work(sum(branch.tokens for branch in sequences))

        def decode(self, latents, request, condition=()):
            self._work(2 * request.image_tokens)
            return super().decode(latents, request, condition)

        @staticmethod
        def _work(tokens):
            CountedMemory.tokens += tokens

    monkeypatch.setattr(measuring, "device_memory", lambda device: CountedMemory())
    found = measuring.calibrate(Pipeline(), INFO)
    own_size = 64  # tokens of the image
    assert found.memory.token_bytes == pytest.approx(7, abs=1)
    assert found.memory.step_bytes == pytest.approx(100, abs=5)
    assert found.memory.decode_bytes == pytest.approx(100 + 14 * own_size, abs=5)
    assert found.memory.decode_token_bytes == pytest.approx(14, abs=1)
    assert measuring.calibrate(ToyPipeline(), INFO, has_text_encoder=True).room is None
