"""The drawings of a study: methods against each other, against their cost, and against lambda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ensemblenet.metrics.scores import row_score
from ensemblenet.reports.figures import BLUE, GREY, NARROW, ORANGE

__all__ = ["draw_against_cost", "draw_heads", "draw_measures", "draw_weights"]

Row = Mapping[str, Any]

_BASE_LINE: dict[str, Any] = {"color": ORANGE, "linestyle": "--", "linewidth": 1, "zorder": 0}
_WIDE = 4  # times as large, and the scale is logarithmic
_COLOURS = {"base": ORANGE, "ours": BLUE}  # of what a row's `kind` names


def draw_measures(rows: Sequence[Row], measures: Sequence[tuple[str, str]]) -> Drawing:
    """Measures of every method, one below the other: a panel for each measure, with the base's as a line.

    Args:
        rows: from top to bottom; those whose `kind` is "larger" are drawn hollow.
        measures: name and label of each; rows have `<name>_mean` and perhaps `<name>_std`, or lack both.
    """
    drawing = Drawing(figsize=(NARROW, 0.9 + 0.32 * len(rows)), layout="constrained")
    panels = drawing.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for panel, (name, label) in zip(panels, measures, strict=True):
        for place, row in enumerate(rows):
            if row.get(f"{name}_mean") is not None:
                score = row_score(name)
                mean, spread = score.shown(row[f"{name}_mean"]), abs(score.scale) * row.get(f"{name}_std", 0)
                panel.errorbar(mean, place, xerr=spread, **_marker(row))
                if row.get("kind") == "base":
                    panel.axvline(mean, **_BASE_LINE)
        panel.set_xlabel(label)
        panel.xaxis.set_major_locator(MaxNLocator(7 // len(measures)))
        panel.margins(x=0.12)
    _name_lines(panels[0], rows)
    return drawing


def draw_heads(rows: Sequence[Row], label: str) -> Drawing:
    """Score of each method's prediction beside that of its single heads, mean over heads; the base's as a line."""
    several = [row for row in rows if row["num_heads"] > 1]
    drawing = Drawing(figsize=(NARROW, 0.9 + 0.32 * len(several)), layout="constrained")
    axes = drawing.subplots()
    for place, row in enumerate(several):
        ends = (row["error_mean"], row["head_error_mean"])
        axes.plot(ends, (place, place), color=GREY, linewidth=1.5, zorder=1)
        axes.errorbar(ends[0], place, xerr=row["error_std"], **_marker(row))
        axes.plot(ends[1], place, "s", color=GREY, markersize=6)
    axes.axvline(rows[0]["error_mean"], **_BASE_LINE)
    if max(row["head_error_mean"] for row in several) > _WIDE * max(row["error_mean"] for row in rows):
        axes.set_xscale("log")
        _few_log_ticks(axes.xaxis)
    axes.set_xlabel(label)
    _name_lines(axes, several)
    return drawing


def draw_against_cost(rows: Sequence[Row], label: str, lower_is_better: bool) -> Drawing:
    """Score against parameters and against MACs, as shares of the first row's, the base's, whose score is a line.

    The base, and of methods that cost about the same the best, are named; the rest is for the table.

    Args:
        rows: the base, and behind it the others from the best to the worst.
        label: the score's name.
        lower_is_better: of that score; names stand on the better side of a mark, the base's on the other.
    """
    base = rows[0]
    drawing = Drawing(figsize=(NARROW, 6.4), layout="constrained")
    panels = drawing.subplots(2, 1)
    for panel, (key, size) in zip(panels, [("parameters", "parameters"), ("macs", "MACs")], strict=True):
        shares = [row[key] / base[key] for row in rows]
        named: list[float] = []
        for share, row in zip(shares, rows, strict=True):
            panel.errorbar(share, row["error_mean"], yerr=row["error_std"], **_marker(row), alpha=0.8)
            if row is base or not any(0.75 < other / share < 1 / 0.75 for other in named):
                named += [] if row is base else [share]
                up = 1 if (row is base) == lower_is_better else -1
                panel.annotate(
                    row["method"],
                    (share, row["error_mean"] + up * row["error_std"]),
                    xytext=(0, 7 * up),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if up > 0 else "top",
                    fontsize=9,
                )
        panel.axhline(base["error_mean"], **_BASE_LINE)
        panel.set_xscale("log")
        ticks = [tick for tick in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16) if min(shares) / 1.5 < tick < max(shares) * 1.5]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.margins(0.2)
        panel.set_xlabel(f"{size}, share of the base's")
        panel.set_ylabel(label)
    return drawing


def draw_weights(rows: Sequence[Row], base: Row, label: str) -> Drawing:
    """Score of the ensemble and of its single heads against lambda, with the base's as a line.

    Args:
        rows: the rows of one conversion, by rising `weight` of their `setup`.
        base: the base's row.
        label: the score's name.
    """
    drawing = Drawing(figsize=(NARROW, 3.2), layout="constrained")
    axes = drawing.subplots()
    positions = range(len(rows))
    for name, line, colour, marker in [
        ("error", "ensemble", BLUE, "o"),
        ("head_error", "single heads, mean", GREY, "s"),
    ]:
        means, spreads = ([row[f"{name}_{part}"] for row in rows] for part in ("mean", "std"))
        axes.errorbar(positions, means, yerr=spreads, fmt=f"{marker}-", color=colour, capsize=4, label=line)
    axes.axhline(base["error_mean"], color=ORANGE, linestyle="--", label="base")
    axes.set_xticks(list(positions), [f"{row['setup']['weight']:g}" for row in rows])
    axes.set_xlabel("λ, the co-distillation weight")
    axes.set_ylabel(label)
    means = [row[f"{name}_mean"] for row in rows for name in ("error", "head_error")]
    if max(means) > _WIDE * min(means):  # single heads are far worse at λ = 0
        axes.set_yscale("log")
        _few_log_ticks(axes.yaxis)
    axes.legend()
    return drawing


def _marker(row: Row) -> dict[str, Any]:
    colour = _COLOURS.get(row.get("kind", ""), GREY)
    hollow = {"markerfacecolor": mpl.rcParams["axes.facecolor"]} if row.get("kind") == "larger" else {}
    above = 3 if row.get("kind") in _COLOURS else 2
    return {"fmt": "o", "color": colour, "capsize": 3, "markersize": 7, "zorder": above, **hollow}


def _few_log_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _name_lines(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", alpha=0.5)
