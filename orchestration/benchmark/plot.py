"""Accuracy against measured latency, a panel for each batch size, the front as a line."""

from __future__ import annotations

import io
from itertools import cycle

from matplotlib.figure import Figure

from orchestration.benchmark.measure import Row
from orchestration.benchmark.report import Report
from orchestration.search.pareto import unbeaten

_MARKERS = "osD^vP*X"


def figure(report: Report) -> Figure:
    """A colour for each model and a marker for each engine; the front is a line."""
    made = Figure((6.5 * len(report.batches), 4.6), layout="constrained")
    panels = made.subplots(1, len(report.batches), squeeze=False)[0]
    names = list(dict.fromkeys(row.model for row in report.rows))
    choices = list(dict.fromkeys(row.choice for row in report.rows))
    colours = dict(zip(names, cycle(f"C{i}" for i in range(10)), strict=False))
    markers = dict(zip(choices, cycle(_MARKERS), strict=False))
    for axes, batch in zip(panels, report.batches, strict=True):
        rows = [row for row in report.rows if row.batch == batch and row.timed and row.top1 is not None]
        for row in rows:
            label = f"{row.model}, {row.choice}"
            low, high = row.spread
            axes.errorbar(
                1e3 * row.latency,
                100 * (row.top1 or 0),
                xerr=[[1e3 * max(row.latency - low, 0)], [1e3 * max(high - row.latency, 0)]],
                fmt=markers[row.choice],
                color=colours[row.model],
                label=label,
            )
        best = unbeaten(rows, cost=lambda row: row.latency, worth=_worth)
        axes.step(
            [1e3 * row.latency for row in best],
            [100 * (row.top1 or 0) for row in best],
            "k-",
            where="post",
            label="nobody beats these",
            zorder=0,
        )
        axes.set_xlabel(f"latency at batch {batch} (ms), measured")
        axes.set_ylabel("test top-1 (%)")
        axes.set_title(f"batch {batch}, {report.machine['processor']}")
    panels[-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return made


def accuracy_over_latency(report: Report) -> bytes:
    """The figure as PNG."""
    sink = io.BytesIO()
    figure(report).savefig(sink, format="png", dpi=120)
    return sink.getvalue()


def _worth(row: Row) -> float:
    return row.top1 or 0.0
