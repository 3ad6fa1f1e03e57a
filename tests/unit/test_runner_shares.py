"""A rank's share of a plan: nothing of other ranks, of requests that have gone or of nobody; and what failures say."""

from itertools import groupby

import msgspec
import pytest
import torch

from tests.toy_pipeline import InlineSideWork, ToyPipeline, UnluckyPipeline, toy_request
from vllm_cfg_plugin.distributed.sequence_group import MemberFailedError, SequenceGroups
from vllm_cfg_plugin.engine.plan import DECODED, PREVIEWED, Admission, Assign, Decode, Encode, Preview, StepPlan
from vllm_cfg_plugin.params import ImageInput
from vllm_cfg_plugin.worker.held import HeldRequests
from vllm_cfg_plugin.worker.runner import StepRunner
from vllm_cfg_plugin.worker.state import RequestState


class Rank:
    """One rank's runner; keeps what it exchanged and forwarded, and what it cancelled beside the steps."""

    def __init__(self, pipeline=None, rank=0, ranks=1):
        self.pipeline = pipeline or ToyPipeline()
        self.exchanged, self.forwarded, self.cancelled = [], [], []
        self.pipeline.transformer.fail = self.forwarded.append
        self.runner = StepRunner(self.pipeline, rank, ranks, self._gather, InlineSideWork(rank))
        self.runner.side.cancel = self.cancelled.append
        self._ranks = ranks

    def _gather(self, row):
        self.exchanged.append(row)
        return torch.stack([row] * self._ranks)

    def run(self, advance=True, **changes):
        lists = {name: [] for name in ("retire", "admit", "encodes", "assign", "decodes")} | changes
        return self.runner.run(StepPlan(step=0, advance=advance, **lists))

    def join(self, *requests, owners=(0, 0), advance=True):
        return self.run(
            admit=[Admission(id, request) for id, request in enumerate(requests)],
            encodes=[Encode(id, branch, rank) for id, _ in enumerate(requests) for branch, rank in enumerate(owners)],
            assign=[Assign(id, owners) for id, _ in enumerate(requests)] if advance else [],
            advance=advance,
        )

    def reports(self):
        return [(report.id, report.branch) for report in self.runner.side.take()]


def with_image(request):
    return msgspec.structs.replace(request, images=[ImageInput("red", "RGB", 1, 1, b"\x03\x00\x00")])


def test_a_rank_neither_encodes_nor_decodes_what_is_anothers():
    rank = Rank(rank=1, ranks=2)
    rank.join(toy_request(steps=1), owners=(0, 1))
    rank.run(decodes=[Decode(0, 0)])
    assert rank.reports() == [(0, 1)]
    assert not rank.runner.states, "but it forgets the request with all the others"


def test_nothing_is_exchanged_where_nobody_runs():
    rank = Rank()
    rank.run()
    rank.join(toy_request(), advance=False)
    rank.run()
    assert rank.exchanged == []


def test_a_retired_requests_side_work_is_cancelled():
    """A retired request is forwarded no more and its side work is cancelled."""
    rank = Rank()
    rank.join(toy_request(steps=9), toy_request(steps=9, seed=1))
    rank.run(retire=[0])
    assert [len(sequences) for sequences in rank.forwarded] == [4, 2]
    assert rank.cancelled == [0]
    rank.run(retire=[1])
    assert len(rank.exchanged) == 2


def test_an_encode_for_a_request_that_failed_before_is_nobodys():
    rank = Rank()
    rank.run(encodes=[Encode(7, 0, 0)], advance=False)
    assert rank.reports() == []


@pytest.mark.parametrize("sees_images", [True, False])
def test_a_decode_gets_the_images_only_where_it_sees_them(sees_images):
    """A decode delivers its pixels and is given the images only where it sees them."""

    class Decoder(ToyPipeline):
        decode_sees_images = sees_images

        def decode(self, latents, request, condition=()):
            given.append([float(value) for value in condition])
            return super().decode(latents, request, condition).permute(0, 2, 1, 3)

    given = []
    rank = Rank(Decoder())
    rank.join(with_image(toy_request(steps=1)))
    rank.run(decodes=[Decode(0, 0)])
    assert rank.reports()[-1] == (0, DECODED)
    assert given == ([[3.0]] if sees_images else [[]])
    pixels = rank.runner.side.images[0]
    assert pixels.unique().tolist() == [7]
    assert pixels.is_contiguous()


def test_a_failure_while_noise_is_drawn_is_reported_at_once():
    rank = Rank(UnluckyPipeline())
    ((id, why),) = rank.join(toy_request("draw_noise"), advance=False).failed
    assert (id, why) == (0, "failed while preparing its latents: ValueError: draw_noise is out of luck")


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        ("forward_group", "preparing its forward: ValueError: forward_group is out of luck"),
        ("pack_branches", "predicting its noise: ValueError: pack_branches is out of luck"),
        (
            "one prediction too few",
            "predicting its noise: ValueError: unpack_predictions returned 0 predictions of 1 branches",
        ),
        (
            "a prediction of another shape",
            "predicting its noise: ValueError: its prediction has shape [1, 3, 4], but prediction_shape says [1, 4, 4]",
        ),
        ("combine_branches", "stepping its latents: ValueError: combine_branches is out of luck"),
    ],
)
def test_a_failure_says_what_was_being_done(hook, says):
    ((_, why),) = Rank(UnluckyPipeline()).join(toy_request(hook)).failed
    assert why == f"failed while {says}"


def test_a_branch_is_told_its_timestep_and_those_ahead():
    rank = Rank()
    rank.join(toy_request(negative=None, steps=4), owners=(0,))
    rank.run()
    timesteps = rank.pipeline.make_noise_scheduler(toy_request(steps=4)).timesteps
    for step, (sequence,) in enumerate(rank.forwarded):
        assert sequence.timestep == timesteps[step]
        assert torch.equal(sequence.timesteps_ahead, timesteps[step + 1 :])


def test_branches_of_equal_lengths_are_neighbours_in_the_forward():
    rank = Rank()
    rank.join(*(toy_request("ab", "cd", image_tokens=tokens) for tokens in (4, 9, 4, 9, 4)))
    lengths = [sequence.latents.shape[1] for sequence in rank.forwarded[0]]
    assert [(length, len([*run])) for length, run in groupby(lengths)] == [(4, 6), (9, 4)]


class PlayedGroup:
    """A sequence group of two, whose other process can't go on with what `fails` says."""

    size, is_stoppable, trades = 2, True, 0

    def __init__(self, rank, fails=False):
        self.rank, self.fails = rank, fails

    def any(self, flags):
        return [flag or self.fails for flag in flags]


def in_group(process, fails=False):
    rank = Rank()
    group = PlayedGroup(process, fails)
    rank.runner = StepRunner(rank.pipeline, 0, 1, rank._gather, InlineSideWork(0), groups=SequenceGroups(group, group))
    return rank


@pytest.mark.parametrize("process", [0, 1])
def test_processes_of_a_rank_all_encode_and_decode_in_turn(process):
    rank = in_group(process)
    rank.join(toy_request(steps=2, negative=None), toy_request(steps=2, negative=None, seed=1), owners=(0,))
    assert rank.reports() == [(0, 0), (1, 0)]
    plan = StepPlan(1, [], [], [], [], True, [Decode(0, 0), Decode(1, 0)], previews=[Preview(0, 0), Preview(1, 0)])
    rank.runner.run(plan)
    assert rank.reports() == [(process, PREVIEWED), (process, DECODED)]


def test_what_another_process_cannot_go_on_with_is_not_forwarded():
    rank = in_group(0, fails=True)
    report = rank.join(toy_request(steps=2))
    assert report.failed == [], "the other one reports why"
    assert rank.forwarded == []
    assert (rank.exchanged[0][-1:] == 1).all(), "all cfg ranks learn of it"
    assert not rank.runner.states


def test_a_request_that_failed_is_cancelled_beside_the_steps_too():
    rank = Rank()
    rank.join(toy_request(steps=3))
    rank.pipeline.combine_branches = lambda *arguments: 1 / 0
    rank.run()
    rank.run()
    assert rank.cancelled == [0]
    assert not rank.runner.states


def test_long_work_beside_the_steps_is_known_as_such():
    rank, seen = Rank(), []
    side = rank.runner.side
    encode, decode = side.encode, side.decode
    side.encode = lambda id, branch, run, is_long=False: seen.append(("encode", is_long)) or encode(id, branch, run)
    side.decode = lambda id, run, is_long=False: seen.append(("decode", is_long)) or decode(id, run)
    for is_long in (False, True):
        rank.run(
            admit=[Admission(0, toy_request(negative=None, steps=1))],
            encodes=[Encode(0, 0, 0, is_long)],
            assign=[Assign(0, (0,))],
            decodes=[Decode(0, 0, is_long)],
        )
    assert seen == [("encode", False), ("decode", False), ("encode", True), ("decode", True)]


@pytest.mark.parametrize(("rank", "keeps"), [(0, []), (1, [5])])
def test_the_rank_of_a_videos_first_branch_keeps_it(rank, keeps):
    rank, kept = Rank(rank=rank, ranks=2), []
    rank.runner.side.keep = lambda id, steps, run: kept.append(steps)
    rank.join(msgspec.structs.replace(toy_request(steps=9), num_frames=5), owners=(1, 0))
    for _ in range(6):
        rank.run()
    assert kept == keeps


def test_what_another_process_of_the_cfg_rank_reports_is_not_reported_twice():
    held, state = HeldRequests(), RequestState(0, toy_request())
    held.note_failure(state, "predicting its noise", MemberFailedError(1))
    assert state.error
    assert held.take_failures() == []
