"""The pictures in the docs: they show what the dashboard's queries and a trace say."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import draw
from benchmarks.draw import Series, draw_dashboard, draw_trace, read_trace
from vllm_cfg_plugin.engine.plan import DECODED, SideReport
from vllm_cfg_plugin.engine.trace import TraceFile

DASHBOARD = json.loads((Path(__file__).parents[2] / "examples/grafana_dashboard.json").read_text(encoding="utf-8"))


def test_every_query_of_the_dashboard_is_drawn(tmp_path):
    asked = []

    def query(expression):
        asked.append(expression)
        return [Series({"outcome": "done"}, [(0.0, 1.0), (2.0, 3.0)])]

    draw_dashboard(DASHBOARD, query, tmp_path / "dashboard.png")
    assert sorted(asked) == sorted(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    assert Image.open(tmp_path / "dashboard.png").size[0] > 1000


@pytest.mark.parametrize(("template", "shown"), [("{{rank}} of {{ engine }}", "1 of 0"), ("all", "all")])
def test_a_legend_names_labels(template, shown):
    assert draw._legend(template, {"rank": "1", "engine": "0"}) == shown


def test_a_trace_is_read_while_its_engine_runs_and_is_drawn(tmp_path):
    trace = TraceFile(tmp_path / "trace.json", 0, 2)
    trace.note_side_report(SideReport(0, 1, 1, 7.0), None)
    trace.note_side_report(SideReport(0, DECODED, 0, 3.0), None)
    trace.flush()
    lanes, spans = read_trace(tmp_path / "trace.json")
    assert lanes == {0: "rank 0", 1: "rank 0, beside the steps", 2: "rank 1", 3: "rank 1, beside the steps"}
    assert [(span.lane, span.kind, round(span.ended - span.began, 6)) for span in spans] == [
        (3, "encode", 0.007),
        (1, "decode", 0.003),
    ]
    draw_trace(lanes, spans, tmp_path / "trace.png")
    assert Image.open(tmp_path / "trace.png").size[0] > 1000
    trace.close()
