"""A stream costs the neighbours that do not stream nothing: closed loops in virtual time, which knows no noise.

The ranks are those of `benchmarks/simulate.py`: cores that steps and previews share as threads do, and that take what
the cost model says. `benchmarks/streaming.py` measures a real server.
"""

import random
import statistics
from itertools import count

import msgspec
import pytest

from benchmarks.contestants import request
from benchmarks.virtual_engine import VirtualEngine
from benchmarks.virtual_ranks import Overheads, VirtualRanks
from vllm_cfg_plugin.engine.batching import StepBatch
from vllm_cfg_plugin.engine.cost import CostModel
from vllm_cfg_plugin.engine.plan import PREVIEWED

# The bundled model's, as a start measured them.
EMOJI = CostModel(
    step_us=3350,
    token_us=18.9,
    square_us=0.025,
    encode_us=2710,
    encode_token_us=23.3,
    decode_us=1710,
    decode_token_us=43.1,
)
OVERHEADS = Overheads(exchange_us=14, request_us=30, admit_us=300, engine_us=100)
MOST = 1.02


def neighbours_seconds(previews, side, guided, neighbours=3, images=150):
    """Mean seconds a step of the neighbours of one who asks for so many previews; all ask again and again.

    Their requests differ in steps, else all would begin and end together for ever.
    """
    ranks = VirtualRanks(2, EMOJI, OVERHEADS)
    engine = VirtualEngine(lambda clock: StepBatch(2, 8, 10**6, EMOJI, clock), ranks, OVERHEADS.engine_us)
    jobs = [random.Random(client) for client in range(neighbours + 1)]
    numbers = [count() for _ in jobs]

    def ask(client):
        name = f"{client}-{next(numbers[client])}"
        spec = request(side, jobs[client].randint(10, 30), guided, name=name)
        engine.submit(engine.now, name, msgspec.structs.replace(spec, previews=0 if client else previews))

    for client in range(neighbours + 1):
        ask(client)
    answered, taken = 0, []
    while len(taken) < images * neighbours:
        engine.run_until(engine.now + 1)
        for served in engine.served[answered:]:
            client = int(served.name.partition("-")[0])
            taken += [served.latency / served.spec.num_inference_steps] if client else []
            ask(client)
        answered = len(engine.served)
    return statistics.mean(taken)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("side", [64, 128, 256])
def test_neighbours_pay_nothing_for_previews(side, guided):
    """If the one who streams rested never, they would pay 3 to 6 %."""
    plain, beside = (neighbours_seconds(previews, side, guided) for previews in (0, 3))
    assert beside / plain <= MOST


@pytest.mark.parametrize("side", [64, 256])
def test_the_first_preview_is_there_within_a_third_of_the_steps(side, monkeypatch):
    shares, note = [], StepBatch.note_side_report

    def note_and_see(batch, report):
        request = batch.known(report.id)
        if report.branch == PREVIEWED and request is not None and not request.made_previews:
            shares.append(request.done_steps / request.spec.steps)
        return note(batch, report)

    monkeypatch.setattr(StepBatch, "note_side_report", note_and_see)
    neighbours_seconds(3, side, guided=True, images=40)
    assert len(shares) > 20
    assert max(shares) <= 1 / 3
