"""What /metrics, the dashboard and a trace show of an engine."""

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from tests.toy_pipeline import toy_request
from tests.unit.http_app import GENERATIONS, FakeEngine, disconnect_mid_denoise, make_app, send
from tests.unit.test_batching import PlayedRanks, run_plan
from vllm_cfg_plugin.engine.batching import StepBatch
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.engine.observers import Observers
from vllm_cfg_plugin.engine.plan import DECODED, SideReport
from vllm_cfg_plugin.engine.result import ResultHeader, pack_result
from vllm_cfg_plugin.engine.stats import StatsCollector
from vllm_cfg_plugin.engine.step_result import StepResult
from vllm_cfg_plugin.engine.trace import TraceFile, trace_path
from vllm_cfg_plugin.entrypoints import metrics

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "examples" / "grafana_dashboard.json").read_text(encoding="utf-8"))
GOOD = {"prompt": "a cat", "seed": 5}


def value(name, **labels):
    return REGISTRY.get_sample_value(f"{metrics.PREFIX}{name}", labels) or 0.0


def collect(steps):
    """Counts of a batch of one guided request and one without guidance, on two ranks."""
    now = SimpleNamespace(time=100.0)
    collector = StatsCollector(3, 2, lambda: now.time)
    batch, ranks = StepBatch(2, 8, 10**6, UNCALIBRATED), PlayedRanks(2)
    batch.add("a", 0, toy_request("a cat", "", steps=steps))
    batch.add("b", 0, toy_request("a dog", None, steps=steps))
    while len(batch):
        planned, decoded = run_plan(batch, ranks)
        collector.note_step(planned.running)
        if planned.running:
            collector.note_result(StepResult(spans=[(1.0, 1.5), (1.0, 1.25)]))
        for request in decoded:
            batch.finish(request)
    return collector, now


def test_an_engine_counts_what_its_ranks_do():
    collector, now = collect(steps=4)
    for milliseconds in (3.0, 0.01):
        collector.note_side_report(SideReport(0, 0, 0, milliseconds))
    collector.note_side_report(SideReport(0, DECODED, 0, 3.0))
    collector.note_restart()
    assert collector.take(is_idle=False) is None, "less than a second has passed"
    now.time += 2
    stats = collector.take(is_idle=False)
    assert (stats.engine, stats.steps, sum(stats.rows), stats.restarts) == (3, 4, 12, 1)
    assert stats.step_seconds == [2.0, 1.0]
    assert max(stats.predicted_us) == stats.longest_us
    assert (stats.encoded, stats.cached) == (1, 1)
    assert collector.take(is_idle=True).steps == 0, "each is counted once"


def test_what_an_engine_counts_is_in_the_registry():
    collector, _ = collect(steps=4)
    before = value("steps_total", engine="3")
    metrics.note_engine(collector.take(is_idle=True))
    assert value("steps_total", engine="3") == before + 4
    assert value("rank_step_seconds_total", engine="3", rank="0") >= 2


def test_requests_are_counted_by_what_became_of_them(monkeypatch):
    engine = FakeEngine()
    app = make_app(engine, monkeypatch)
    outcomes = ("done", "cancelled", "failed")
    before = {outcome: value("results_total", outcome=outcome) for outcome in outcomes}
    refused = value("refused_requests_total", status="400")
    denoised = value("denoise_seconds_count")
    send(app, GENERATIONS, json={**GOOD, "n": 2})
    send(app, GENERATIONS, json={**GOOD, "n": 11})

    async def fail(request):
        return pack_result(ResultHeader(metrics=RequestMetrics(), error="no luck"))

    engine.behave = fail
    send(app, GENERATIONS, json=GOOD)
    disconnect_mid_denoise(app, engine, GENERATIONS, "application/json", json.dumps(GOOD).encode())
    counted = {outcome: value("results_total", outcome=outcome) - before[outcome] for outcome in outcomes}
    assert counted == {"done": 2, "cancelled": 1, "failed": 1}
    assert value("refused_requests_total", status="400") == refused + 1
    assert value("denoise_seconds_count") == denoised + 2


def test_what_caches_of_steps_spare_is_counted():
    before = {source: value("branch_steps_total", source=source) for source in ("computed", "reused")}
    metrics.note_done(RequestMetrics(computed_steps=[8, 5], reused_steps=[0, 3]), None)
    counted = {source: value("branch_steps_total", source=source) - before[source] for source in before}
    assert counted == {"computed": 13, "reused": 3}


def test_cancellation_is_no_failure():
    with pytest.raises(asyncio.CancelledError), metrics.counted_failures():
        raise asyncio.CancelledError


def test_the_dashboards_queries_are_of_metrics_that_there_are():
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    named = {name for query in queries for name in re.findall(r"vllm(?:_cfg)?:\w+", query)}
    ours = {sample.name for family in REGISTRY.collect() for sample in family.samples} | {
        f"{family.name}{suffix}"
        for family in REGISTRY.collect()
        for suffix in {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ())
    }
    vllms = {"vllm:num_requests_running", "vllm:num_requests_waiting"}  # which a test of a server sees
    assert named - ours - vllms == set()


def test_every_metric_is_in_the_dashboard():
    for family in REGISTRY.collect():
        if family.name.startswith(metrics.PREFIX):
            assert family.name in json.dumps(DASHBOARD), family.name


def test_a_trace_has_a_lane_for_each_rank(tmp_path):
    trace = TraceFile(tmp_path / "trace.json", 0, 2)
    batch, ranks = StepBatch(2, 8, 10**6, UNCALIBRATED), PlayedRanks(2)
    batch.add("a", 0, toy_request(steps=2))
    for step in range(4):
        planned, _ = run_plan(batch, ranks)
        trace.note_step(step, planned.running, StepResult(spans=[(step, step + 0.5), (step, step + 0.25)]))
    trace.note_side_report(SideReport(0, DECODED, 1, 7.0), None)
    trace.flush()
    events = json.loads((tmp_path / "trace.json").read_text().rstrip().rstrip(",") + "]")
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    assert names == {0: "rank 0", 1: "rank 0, beside the steps", 2: "rank 1", 3: "rank 1, beside the steps"}
    assert [event["tid"] for event in spans] == [0, 2, 0, 2, 3]
    assert spans[1]["args"]["requests"] == {"a": [1]}
    assert (spans[0]["dur"], round(spans[-1]["dur"])) == (500_000, 7000)
    trace.close()
    trace.note_side_report(SideReport(0, DECODED, 1, 7.0), None)


def test_each_engine_has_a_trace_of_its_own():
    assert [str(trace_path("a/trace.json", engine)) for engine in (0, 1)] == ["a/trace.json", "a/trace.1.json"]


def test_observers_count_restarts_and_close_their_trace(tmp_path):
    observers = Observers(0, 2, "", str(tmp_path / "trace.json"))
    observers.note_restart()
    stats = observers._stats.take(True)
    observers.close()
    assert stats.restarts == 1
    assert observers._trace._file.closed
