"""The second budget beside time: so many tokens a step as a GPU's memory has room for."""

import msgspec
import pytest

from tests.toy_pipeline import ToyPipeline, toy_vllm_config
from tests.unit.fakes import INFO
from vllm_cfg_plugin.config import FIND_TOKEN_BUDGET
from vllm_cfg_plugin.engine.calibration import Calibration, MemoryCost, keep_calibration, slowest, token_budget
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.worker import calibration as measuring

MEMORY = MemoryCost(step_bytes=1000, token_bytes=10, decode_bytes=4000)


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
    assert measuring.calibrate(ToyPipeline(), INFO, has_text_encoder=True).room is None
