"""The page: a plot of the times, and a table of each section."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def write_page(sections: Mapping[str, Rows], title: str) -> str:
    """HTML of all sections' rows, its plot inside."""
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><h1>{html.escape(title)}</h1>"]
    if plot := plot_speed(sections.get("speed", ())):
        parts.append(f'<img alt="milliseconds a step" src="data:image/png;base64,{base64.b64encode(plot).decode()}">')
    for name, rows in sections.items():
        parts.append(f"<h2>{html.escape(name)}</h2>{_table(rows)}")
    return "\n".join(parts)


def plot_speed(rows: Rows) -> bytes:
    """A PNG of milliseconds a step over the number of requests, one picture for each size; empty without any."""
    import matplotlib.pyplot as plt

    timed = [row for row in rows if "ms" in row]
    sides = sorted({row["side"] for row in timed})
    if not sides:
        return b""
    figure, all_axes = plt.subplots(1, len(sides), figsize=(4 * len(sides), 4), squeeze=False)
    for axes, side in zip(all_axes[0], sides, strict=True):
        for who in dict.fromkeys(row["who"] for row in timed):
            own = [(row["requests"], row["ms"]) for row in timed if (row["side"], row["who"]) == (side, who)]
            axes.plot(*zip(*own, strict=True), marker="o", label=who)
        axes.set(title=f"{side} px", xlabel="guided requests", ylabel="ms a step", ylim=(0, None))
    all_axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _table(rows: Rows) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(row.get(name))}" for name in columns) for row in rows)
    return f"<table border=1 cellspacing=0 cellpadding=3><tr>{head}{body}</table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
