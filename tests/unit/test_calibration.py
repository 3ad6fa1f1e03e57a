"""Calibration at start-up: what is timed, within which limits, and what is kept for the next start."""

import math
from dataclasses import replace
from itertools import count

import msgspec
import pytest
import torch

from tests.toy_pipeline import ToyPipeline
from tests.unit.played_group import Played
from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo, TextRules
from vllm_cfg_plugin.distributed.sequence_group import ALONE
from vllm_cfg_plugin.engine.cost import CostModel, PackSample
from vllm_cfg_plugin.params import DiffusionParams
from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline
from vllm_cfg_plugin.pipelines.registry import describe
from vllm_cfg_plugin.worker import calibration, stopwatch
from vllm_cfg_plugin.worker.calibration import calibrate, calibrate_rank
from vllm_cfg_plugin.worker.stopwatch import Run, Stopwatch

INFO = PipelineInfo(
    size_multiple=16,
    pixels_per_token=16,
    text=TextRules(max_tokens=1024),
    cfg_scale="true_cfg_scale",
    default_params=DiffusionParams(height=64, width=64),
)
MADE_OF = CostModel(
    step_us=3000,
    token_us=20,
    square_us=0.05,
    encode_us=2000,
    encode_token_us=30,
    decode_us=1000,
    decode_token_us=200,
)


class FakeClock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    """Time stands still, but for what a pipeline says that its work took."""
    clock = FakeClock()
    monkeypatch.setattr(stopwatch.time, "perf_counter", clock)
    monkeypatch.setattr(stopwatch.time, "thread_time", clock)
    return clock


class TimedPipeline(ToyPipeline):
    """Everything takes what a cost model says, times `slowness` and the next of `disturbances`."""

    def __init__(self, clock, cost=MADE_OF, slowness=1.0, disturbances=None):
        super().__init__()
        self.clock, self.cost, self.slowness = clock, cost, slowness
        self.disturbances = disturbances or (1.0 for _ in count())
        self.packs = []
        self.decoded = []

    def _take(self, us):
        self.clock.seconds += us / 1e6 * self.slowness * next(self.disturbances)

    def predict_noise(self, **kwargs):
        lengths = [s.latents.shape[1] + s.embeds.tokens.shape[0] for s in kwargs["sequences"]]
        self.packs.append(lengths)
        self._take(self.cost.step_us + sum(map(self.cost.forward, lengths)))
        return super().predict_noise(**kwargs)

    def encode_branch(self, request, branch):
        self._take(self.cost.encode(len(request.prompts[branch])))
        return super().encode_branch(request, branch)

    def decode(self, latents, request, condition=()):
        self.decoded.append(request.image_tokens)
        self._take(self.cost.decode(request.image_tokens))
        return super().decode(latents, request)


def assert_close(cost, expected, rel):
    for name in CostModel.__struct_fields__:
        assert getattr(cost, name) == pytest.approx(getattr(expected, name), rel=rel), name


def test_calibration_recovers_what_work_costs(clock):
    found = calibrate(TimedPipeline(clock), INFO)
    assert_close(found.cost, MADE_OF, rel=0.01)
    per_token = MADE_OF.forward(21) / 21
    assert found.token_budget == pytest.approx(19 * MADE_OF.step_us / per_token, rel=0.02)


def test_a_disturbance_now_and_then_changes_little(clock):
    every_third = (3.0 if i % 3 == 0 else 1.0 for i in count())
    assert_close(calibrate(TimedPipeline(clock, disturbances=every_third), INFO).cost, MADE_OF, rel=0.05)


def test_calibration_keeps_to_its_time(clock):
    calibrate(TimedPipeline(clock), INFO)
    assert clock.seconds <= stopwatch.ALL_RUNS_SECONDS


def test_a_huge_model_is_measured_once_in_its_smallest_work(clock):
    pipeline = TimedPipeline(clock, slowness=1000)
    found = calibrate(pipeline, INFO)
    assert (len(pipeline.packs), len(pipeline.decoded), len(pipeline.encoded)) == (1, 1, 1)
    assert found.cost.forward(21) == pytest.approx(1000 * (MADE_OF.step_us + MADE_OF.forward(6)) / 6 * 21, rel=0.01)
    assert found.cost.encode(100) == pytest.approx(1000 * MADE_OF.encode(5))
    assert found.token_budget == 16 + 5  # one image of the model's own size with the short text


def test_without_memory_for_a_larger_pack_the_smaller_ones_count(clock):
    class SmallMemory(TimedPipeline):
        def predict_noise(self, **kwargs):
            if len(kwargs["sequences"]) > 4:
                raise torch.OutOfMemoryError("too many")
            return super().predict_noise(**kwargs)

    found = calibrate(SmallMemory(clock), INFO)
    assert_close(found.cost, MADE_OF, rel=0.01)
    assert found.token_budget == 2 * 4 * 21


def test_a_model_of_one_size_is_not_measured_twice(clock):
    """A model whose smallest image is its own size is not measured twice."""
    pipeline = TimedPipeline(clock)
    calibrate(pipeline, replace(INFO, default_params=DiffusionParams(height=16, width=16)))
    assert sorted({tuple(pack) for pack in pipeline.packs if len(pack) == 1}) == [(6,), (9,), (21,)]


def test_real_time_gives_positive_finite_figures():
    cost = calibrate(ToyPipeline(), INFO).cost
    assert all(math.isfinite(value) and value >= 0 for value in msgspec.structs.astuple(cost))
    assert cost.token_us + cost.step_us + cost.square_us > 0


def test_growth_ends_where_the_next_run_would_take_too_long(clock):
    def takes(seconds):
        def action():
            clock.seconds += seconds

        return action

    runs = [Run(takes(0.01 * size), (size,)) for size in (1, 2, 4, 8, 16, 32, 64)]
    timed = Stopwatch(torch.device("cpu")).climb(runs)
    assert [run.tokens for run in timed] == [1, 2, 4, 8, 16]
    assert [run.sample for run in timed][:2] == [
        PackSample((1,), pytest.approx(1e4)),
        PackSample((2,), pytest.approx(2e4)),
    ]


def test_a_busy_machine_ends_the_repeats_by_wall_time(monkeypatch):
    """A busy machine ends the repeats by the clock on the wall."""
    own, wall = FakeClock(), FakeClock()
    monkeypatch.setattr(stopwatch.time, "thread_time", own)
    monkeypatch.setattr(stopwatch.time, "perf_counter", wall)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def action():
        own.seconds += 0.1
        wall.seconds += 0.8  # others had the core

    watch = Stopwatch(torch.device("cpu"))
    (run,) = watch.climb([Run(action, (1,))])
    watch.repeat_all()
    assert run.us == pytest.approx(1e5)
    assert 1.6 < wall.seconds < stopwatch.BUSY_MACHINE_SECONDS + 0.8
    assert own.seconds < stopwatch.ALL_RUNS_SECONDS / 2


# ---- kept on disk ----


@pytest.fixture
def checkpoint(qwen_image_folders):
    return Checkpoint(str(qwen_image_folders["tiny"]))


@pytest.fixture
def measured(monkeypatch):
    """Counts calibrations; each is another one."""
    calls = []
    one = calibrate(ToyPipeline(), INFO)

    def fake(pipeline, info, has_text_encoder):
        calls.append(info)
        return msgspec.structs.replace(one, token_budget=len(calls))

    monkeypatch.setattr(calibration, "calibrate", fake)
    return calls


def test_a_calibration_is_kept_for_the_next_start(checkpoint, measured, tmp_path):
    folder = tmp_path / "not" / "there yet"
    first = calibrate_rank(ToyPipeline(), checkpoint, folder, 2)
    assert calibrate_rank(ToyPipeline(), checkpoint, folder, 2) == first
    assert len(measured) == 1
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_another_model_dtype_version_or_size_is_measured_anew(
    checkpoint, measured, tmp_path, monkeypatch, qwen_image_folders
):
    """Another model dtype version or number of ranks is measured anew."""
    pipeline = ToyPipeline()
    calibrate_rank(pipeline, checkpoint, tmp_path, 2)
    calibrate_rank(pipeline, checkpoint, tmp_path, 1)
    calibrate_rank(pipeline, Checkpoint(str(qwen_image_folders["small"])), tmp_path, 2)
    half = ToyPipeline()
    half.transformer.to(torch.bfloat16)
    calibrate_rank(half, checkpoint, tmp_path, 2)
    by_weights, by_rows = Played(0, 2), Played(0, 2)
    by_rows.sequence, by_rows.tensor = by_rows, ALONE
    for group in (by_weights, by_rows):
        calibrate_rank(pipeline, checkpoint, tmp_path, 2, group)
    monkeypatch.setattr(calibration.torch, "__version__", "99")
    calibrate_rank(pipeline, checkpoint, tmp_path, 2)
    assert len(measured) == 7


@pytest.mark.parametrize("content", [b"", b"{", b'{"cost": 1}', b"\xff\xfe", b"[]", b"negative", b"no budget"])
def test_a_file_that_makes_no_sense_is_measured_again(checkpoint, measured, tmp_path, content):
    whole = calibrate_rank(ToyPipeline(), checkpoint, tmp_path, 2)
    (path,) = tmp_path.iterdir()
    raw = msgspec.to_builtins(whole)
    if content == b"negative":
        content = msgspec.json.encode({**raw, "cost": {**raw["cost"], "token_us": -1.0}})
    elif content == b"no budget":
        content = msgspec.json.encode({**raw, "token_budget": 0})
    path.write_bytes(content)
    assert calibrate_rank(ToyPipeline(), checkpoint, tmp_path, 2).token_budget == 2
    assert calibrate_rank(ToyPipeline(), checkpoint, tmp_path, 2).token_budget == 2


def test_a_folder_that_cannot_be_written_costs_only_time(checkpoint, measured, tmp_path):
    """A folder that cannot be written costs nothing but the next start's time."""
    file = tmp_path / "file"
    file.write_text("in the way")
    assert calibrate_rank(ToyPipeline(), checkpoint, file / "folder", 2).token_budget == 1
    assert calibrate_rank(ToyPipeline(), checkpoint, file / "folder", 2).token_budget == 2


def test_a_write_that_fails_halfway_leaves_nothing(checkpoint, measured, tmp_path, monkeypatch):
    def disk_full(self, target):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(calibration.Path, "replace", disk_full)
        calibrate_rank(ToyPipeline(), checkpoint, tmp_path, 2)
    assert not list(tmp_path.iterdir())


def test_a_real_calibration_is_read_by_the_next_start(checkpoint, tmp_path, monkeypatch):
    """A real pipeline is calibrated and the next start reads it."""
    pipeline = QwenImagePipeline.load(checkpoint.model, dtype=torch.float32, device=torch.device("cpu"))
    found = calibrate_rank(pipeline, checkpoint, tmp_path, 1)
    default = describe(checkpoint).default_params
    assert found.token_budget >= describe(checkpoint).image_tokens(default.height, default.width)
    assert found.cost.forward(1000) > found.cost.forward(10)
    monkeypatch.setattr(pipeline, "predict_noise", None)
    assert calibrate_rank(pipeline, checkpoint, tmp_path, 1) == found


def test_a_family_that_packs_nothing_is_timed_forward_by_forward(clock):
    class OneByOne(TimedPipeline):
        def forward_group(self, branch):
            return object()

    pipeline = OneByOne(clock)
    calibration = calibrate(pipeline, INFO)
    assert {len(pack) for pack in pipeline.packs} == {1}
    assert calibration.token_budget < 2 * (64 // 16) ** 2 + 2 * len("a cat")  # one request of the model's own size


def test_sizes_end_where_the_models_do(clock):
    pipeline = TimedPipeline(clock)
    calibrate(pipeline, replace(INFO, max_side=96))
    assert max(max(lengths) for lengths in pipeline.packs if len(lengths) == 1) <= (96 // 16) ** 2 + 10
