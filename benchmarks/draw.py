"""Pictures of what a server says of itself: the panels of a Grafana dashboard, and a trace of `--cfg-trace`.

Neither is a copy of Grafana's or Perfetto's own page. The panels' queries are the dashboard's, and whoever calls says
what they are answered with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UNITS = {"ops": "/ s", "s": "s", "percentunit": "%", "short": ""}
_COLUMNS = 24  # of Grafana's grid
_KINDS = {  # of a trace: how names begin -> colour; the order is that of the legend
    "step": "tab:blue",
    "encode": "tab:purple",
    "preview": "tab:orange",
    "decode": "tab:green",
    "long forward": "tab:red",
}


@dataclass(frozen=True)
class Series:
    """One line of a panel: labels of its metric, and (seconds, value) pairs."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]


Query = Callable[[str], list[Series]]


def draw_dashboard(dashboard: Mapping[str, Any], query: Query, out: Path) -> None:
    """Every panel of a dashboard where its grid has it.

    Args:
        query: answers a PromQL query, over the time that is to be shown.
    """
    pyplot = _pyplot()
    panels = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = pyplot.figure(figsize=(15, 0.34 * rows))
    grid = figure.add_gridspec(rows, _COLUMNS, left=0.04, right=0.99, top=0.96, bottom=0.04, wspace=3.5, hspace=0)
    for panel in panels:
        place = panel["gridPos"]
        axes = figure.add_subplot(
            grid[place["y"] + 1 : place["y"] + place["h"] - 1, place["x"] : place["x"] + place["w"]]
        )
        _draw_panel(axes, panel, query)
    figure.savefig(out, dpi=90)
    pyplot.close(figure)


def _draw_panel(axes: Any, panel: Mapping[str, Any], query: Query) -> None:
    settings = panel["fieldConfig"]["defaults"]
    unit = _UNITS[settings.get("unit", "short")]
    for target in panel["targets"]:
        for series in query(target["expr"]):
            values = [value * (100 if unit == "%" else 1) for _, value in series.points]
            legend = _legend(target.get("legendFormat", ""), series.labels)
            axes.plot([at for at, _ in series.points], values, label=legend, linewidth=1.2)
    axes.set_title(f"{panel['title']}{f', {unit}' if unit else ''}", fontsize=9, loc="left")
    axes.set_ylim(bottom=settings.get("min"))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1] not in ([], [""]):
        axes.legend(fontsize=7, loc="upper left", framealpha=0.6)


def _legend(template: str, labels: Mapping[str, str]) -> str:
    """Grafana's `{{label}}` filled in."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match[1], ""), template)


@dataclass(frozen=True)
class Span:
    """One bar of a trace; times in seconds of its clock."""

    lane: int
    name: str
    began: float
    ended: float

    @property
    def kind(self) -> str:
        return next((kind for kind in _KINDS if self.name.startswith(kind)), "")


def read_trace(path: Path) -> tuple[dict[int, str], list[Span]]:
    """The names of a trace's lanes, and its spans; it may be one whose end is missing."""
    text = path.read_text(encoding="utf-8").rstrip().rstrip(",")
    events = json.loads(text if text.endswith("]") else text + "]")
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [
        Span(event["tid"], event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
        if event["ph"] == "X"
    ]
    return lanes, spans


def draw_trace(lanes: Mapping[int, str], spans: Iterable[Span], out: Path) -> None:
    """A lane a rank, and one beside it for what is done beside the steps; a step says how many branches it forwards."""
    pyplot = _pyplot()
    shown = [span for span in spans if span.kind]
    origin = min(span.began for span in shown)
    figure, axes = pyplot.subplots(figsize=(16, 1 + 0.75 * len(lanes)), layout="constrained")
    for kind, colour in _KINDS.items():
        mine = [span for span in shown if span.kind == kind]
        for span in mine:
            bar = (1e3 * (span.began - origin), 1e3 * (span.ended - span.began))
            axes.broken_barh([bar], (span.lane - 0.4, 0.8), color=colour, edgecolor="white", linewidth=0.4)
        if mine:
            axes.broken_barh([], (0, 0), color=colour, label=kind)
    for span in shown:
        if branches := re.search(r": (\d+) branches", span.name):
            middle = 1e3 * ((span.began + span.ended) / 2 - origin)
            axes.text(middle, span.lane, branches[1], ha="center", va="center", fontsize=6, color="white")
    axes.set_yticks(list(lanes), list(lanes.values()))
    axes.set_xlabel("ms")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=len(_KINDS), frameon=False)
    figure.savefig(out, dpi=90)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
