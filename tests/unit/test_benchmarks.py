"""The benchmarks' pure parts: what they compute from what they measured, and the traces that they replay."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import caches, engine_overhead, trace_steps, traffic
from benchmarks.block_traffic import block_traffic, least_bytes
from benchmarks.common import Job, interleave, markdown_table, percentile
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check.profile import idle_share
from benchmarks.traffic import Latency


def test_percentiles_lie_between_their_neighbours():
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([1.0, 2.0], 95) == pytest.approx(1.95)
    assert percentile([7.0], 99) == 7.0
    assert math.isnan(percentile([], 50))


def test_contestants_take_turns_and_the_first_round_is_dropped():
    calls = []
    taken = interleave({name: lambda n, name=name: calls.append((n, name)) or n for name in "ab"}, rounds=2)
    assert calls == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert taken == {"a": [1, 2], "b": [1, 2]}


def test_a_table_keeps_three_digits():
    assert markdown_table(("a", "b"), [("x", 1.23456), (2, 12345.6)]).splitlines()[2:] == [
        "| x | 1.23 |",
        "| 2 | 12346 |",
    ]


def test_a_trace_follows_from_its_seed():
    assert traffic.mixed_jobs(20, seed=1) == traffic.mixed_jobs(20, seed=1)
    first, second = traffic.mixed_jobs(20, seed=1), traffic.mixed_jobs(20, seed=2)
    prompts = {job.prompt for job in first + second}
    assert len(prompts) == 40, "a repeated prompt would find its embedding cached"
    assert sum(job.guided for job in first) == 10
    assert {job.side for job in first} <= set(traffic.SIDES)


def test_poisson_arrivals_come_in_order_and_at_the_rate():
    arrivals = traffic.poisson(traffic.mixed_jobs(4000, seed=0), rate=8.0, seed=3)
    times = [arrival.at for arrival in arrivals]
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(8.0, rel=0.1)


def test_a_list_of_prompts_takes_only_equal_jobs():
    jobs = [Job(str(n), side, 4, guided) for n, (side, guided) in enumerate([(64, True), (128, True), (64, False)])]
    waiting = [*jobs, Job("3", 64, 4, True), Job("4", 64, 8, True), Job("5", 64, 4, True)]
    assert [job.prompt for job in traffic.take_batch(waiting, most=2)] == ["0", "3"]
    assert [job.prompt for job in waiting] == ["1", "2", "4", "5"]


def test_the_objective_is_relative_to_the_same_job_alone():
    short, long = Job("short", 64, 4, True), Job("long", 64, 20, True)
    step_s = traffic.step_seconds([Latency(Job("alone", 64, 10, True), 1.0)])
    summary = traffic.summarise([Latency(short, 1.3), Latency(long, 5.9)], step_s, slo=3)
    assert summary.slo_share == 0.5  # 1.3 s are too long for 0.4 s of work, 5.9 s are not for 2 s
    assert summary.guided_p50 == summary.p50 == pytest.approx(3.6)


def test_how_near_a_picture_is_to_another():
    picture = np.random.default_rng(0).integers(0, 200, (32, 32, 3), dtype=np.uint8)
    assert (caches.psnr(picture, picture), caches.ssim(picture, picture)) == (99.0, pytest.approx(1))
    assert caches.psnr(picture, picture + np.uint8(10)) == pytest.approx(20 * math.log10(25.5))
    noisy = [picture + np.random.default_rng(1).integers(0, most, picture.shape, dtype=np.uint8) for most in (8, 40)]
    assert 1 > caches.ssim(picture, noisy[0]) > caches.ssim(picture, noisy[1]) > 0


def test_what_is_recommended_gains_enough_and_loses_little():
    quality = {mode: caches.Quality(top1, 30.0, 0.9) for mode, top1 in (("off", 0.9), ("a", 0.89), ("b", 0.88))}
    assert caches.recommended({"off": 10.0, "a": 15.0, "b": 20.0}, quality) == "a"
    assert caches.recommended({"off": 10.0, "a": 14.0, "b": 20.0}, quality) == ""


def test_only_steps_with_all_requests_count_for_the_overhead():
    spans = [(0.0, 0.1, 1, 50), (1.0, 1.1, 2, 30), (3.0, 3.5, 2, 20), (4.0, 4.1, 2, 20), (9.0, 9.1, 1, 10)]
    steps = engine_overhead.steady(spans, count=2)
    assert steps.periods_us == pytest.approx([2e6, 1e6])
    assert steps.gaps_us == pytest.approx([1.9e6, 0.5e6])
    assert steps.plan_bytes == [30, 20]


def test_a_profile_adds_up_to_the_time_from_step_to_step():
    one = [("step", 0.0, 1.0), ("forward", 0.1, 0.6), ("exchange", 0.6, 0.9)]
    two = [("step", 1.5, 2.5), ("forward", 1.6, 2.1), ("exchange", 2.1, 2.2)]
    assert trace_steps.self_seconds(one) == pytest.approx({"step": 0.2, "forward": 0.5, "exchange": 0.3})
    per_step = dict(zip(trace_steps.LABELS, trace_steps.profile([*two, *one]), strict=True))
    assert per_step["forward"] == pytest.approx(500)
    assert per_step[trace_steps.NO_PLAN] == pytest.approx(250)
    assert sum(per_step.values()) == pytest.approx(1250)


def test_a_hook_inside_another_is_counted_once():
    events = [("outer", 0.0, 10.0), ("inner", 1.0, 4.0), ("inmost", 2.0, 3.0), ("inner", 5.0, 6.0)]
    assert trace_steps.self_seconds(events) == pytest.approx({"outer": 6, "inner": 3, "inmost": 1})


def test_a_gpu_is_idle_where_no_kernel_runs():
    assert idle_share([(0, 2), (1, 3), (6, 10)]) == pytest.approx(0.3)
    assert idle_share([(5, 6)]) == 0


def test_the_gpu_check_runs_in_tiny_form_and_writes_its_page(tmp_path):
    only = ("environment", "attention", "parity", "speed", "profile", "memory")
    arguments = [argument for name in only for argument in ("--only", name)]
    assert gpu_check.main(["--tiny", "--out", str(tmp_path), *arguments]) == 0
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert tuple(results) == only
    assert all(rows and not any("failed" in row for row in rows) for rows in results.values())
    assert all(row["alone = batched"] for row in results["parity"])
    assert {"ours", "ours, int8", "diffusers one by one"} <= {row["who"] for row in results["speed"]}
    page = (tmp_path / "gpu_check.html").read_text()
    assert "data:image/png" in page
    assert "<h2>memory</h2>" in page


def test_compiled_pieces_of_a_block_move_fewer_bytes_in_fewer_kernels():
    plain, compiled = (block_traffic(256, 2, is_compiled) for is_compiled in (False, True))
    assert least_bytes(256, 2) < compiled.moved.total() < 0.6 * plain.moved.total()
    assert compiled.kernels.total() < plain.kernels.total() / 2
    alike = block_traffic(256, 3, True)
    assert alike.kernels.total() == compiled.kernels.total(), "whatever the number of sequences"


def test_the_gpu_check_needs_no_vllm():
    script = "import sys, benchmarks.gpu_check.__main__; sys.exit(any(m.split('.')[0] == 'vllm' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
