"""The drawings of a study: methods against each other, against their cost, and against lambda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from scipy.optimize import isotonic_regression

from ensemblenet.metrics.scores import row_score
from ensemblenet.reports.figures import BLUE, GREY, NARROW, ORANGE

__all__ = ["against_cost_height", "draw_against_cost", "draw_heads", "draw_measures", "draw_weights", "spread_labels"]

Row = Mapping[str, Any]

_BASE_LINE: dict[str, Any] = {"color": ORANGE, "linestyle": "--", "linewidth": 1, "zorder": 0}
_WIDE = 4  # times as large, and the scale is logarithmic
_SPREAD = 2  # the same, of costs
_FAR = 6  # and more than this, doublings alone are ticks enough
_LINE = 0.19  # inches of a label
_LEAST = 3.2  # inches of a panel
_COLOURS = {"base": ORANGE, "ours": BLUE}  # of what a row's `kind` names


def draw_measures(rows: Sequence[Row], measures: Sequence[tuple[str, str]], least: float = 0.0) -> Drawing:
    """Measures of every method, one below the other: a panel for each measure, with the base's as a line.

    Args:
        rows: from top to bottom; those whose `kind` is "larger" are drawn hollow.
        measures: name and label of each; rows have `<name>_mean` and perhaps `<name>_std`, or lack both.
        least: the least height, in inches.
    """
    drawing = Drawing(figsize=(NARROW, max(least, _measures_height(rows))), layout="constrained")
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


def _measures_height(rows: Sequence[Row]) -> float:
    return 0.9 + 0.32 * len(rows)


def draw_heads(rows: Sequence[Row], label: str) -> Drawing:
    """Score of each method's prediction beside that of its single heads, mean over heads; the base's as a line."""
    several = [row for row in rows if row["num_heads"] > 1]
    drawing = Drawing(figsize=(NARROW, _measures_height(several)), layout="constrained")
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


def draw_against_cost(rows: Sequence[Row], costs: Mapping[str, str], label: str, lower_is_better: bool) -> Drawing:
    """Score against costs, as shares of the base's: a panel for each cost, every method named at the right.

    The base's score and cost are lines; what is better at no more than its cost lies in the shaded corner.

    Args:
        rows: the base, and behind it the others.
        costs: the names of costs by their key in the rows.
        label: the score's name.
        lower_is_better: of that score.
    """
    base = rows[0]
    drawing = Drawing(figsize=(NARROW, against_cost_height(rows, len(costs))), layout="constrained")
    panels = drawing.subplots(len(costs), 1, squeeze=False)[:, 0]
    for panel, (key, cost) in zip(panels, costs.items(), strict=True):
        shares = [row[key] / base[key] for row in rows]
        for share, row in zip(shares, rows, strict=True):
            panel.errorbar(share, row["error_mean"], yerr=row["error_std"], **_marker(row), alpha=0.8)
        if max(shares) > _SPREAD * min(shares):
            panel.set_xscale("log", base=2)
            halves = (1,) if max(shares) > _FAR * min(shares) else (1, 1.5)
            panel.xaxis.set_major_locator(LogLocator(2, subs=halves))
            panel.xaxis.set_major_formatter("{x:g}")
        else:
            panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.margins(x=0.12, y=0.08)
        panel.axhline(base["error_mean"], **_BASE_LINE)
        panel.axvline(1, **_BASE_LINE)
        corner = 0 if lower_is_better else 1
        (left, _), limits = panel.get_xlim(), panel.get_ylim()
        panel.fill_between([left, 1], base["error_mean"], limits[1 - int(lower_is_better)], color=BLUE, alpha=0.08)
        panel.text(
            0.02,
            0.02 + 0.96 * corner,
            "better, at no more cost",
            transform=panel.transAxes,
            va="top" if corner else "bottom",
            color=BLUE,
            fontsize=9,
        )
        panel.set(xlim=(left, panel.get_xlim()[1]), ylim=limits)
        panel.set_xlabel(f"{cost}, share of the base's")
        panel.set_ylabel(label)
    drawing.draw_without_rendering()  # lays the panels out: their height decides which names would overlap
    for panel, key in zip(panels, costs, strict=True):
        points = [(row[key] / base[key], row["error_mean"]) for row in rows]
        _name_points(panel, rows, points, _LINE * drawing.dpi / panel.get_window_extent().height)
    return drawing


def against_cost_height(rows: Sequence[Row], panels: int) -> float:
    """The height of [`draw_against_cost`][ensemblenet.reports.comparison_figures.draw_against_cost], in inches.

    Its names need it, and it is no less than that of one measure of the same rows, which stands beside it.
    """
    return max(panels * max(_LEAST, _LINE * len(rows) + 0.7), _measures_height(rows))


def _name_points(panel: Axes, rows: Sequence[Row], points: Sequence[tuple[float, float]], gap: float) -> None:
    """The methods' names right of a panel, each with a line to its point; the gap is a share of its height."""
    low, high = panel.get_ylim()
    places = spread_labels([(y - low) / (high - low) for _, y in points], gap)
    for row, point, place in zip(rows, points, places, strict=True):
        panel.annotate(
            row["method"],
            point,
            (1.06, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=_COLOURS.get(row.get("kind", ""), mpl.rcParams["text.color"]),
            arrowprops={
                "arrowstyle": "-",
                "color": GREY,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def spread_labels(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Places for labels in one column: none overlap, and together they are as near as can be to where they belong.

    It is a least-squares fit in which the order is kept: with k gaps taken off the k-th place, neighbours may touch but
    not change sides, which is isotonic regression.

    Args:
        wanted: where each belongs, of any order.
        gap: the least distance of two.
        low: the least place.
        high: the greatest; too many labels reach beyond both ends by the same.

    Returns:
        The place of each.

    Example:
        >>> [round(place, 2) for place in spread_labels([0.5, 0.1, 0.5, 0.9], gap=0.2)]
        [0.4, 0.1, 0.6, 0.9]
    """
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    offsets = [gap * place for place in range(len(wanted))]
    room = high - low - offsets[-1]
    ends = (low, high - offsets[-1]) if room >= 0 else (low + room / 2, low + room / 2)
    fitted = isotonic_regression([wanted[k] - offset for k, offset in zip(order, offsets, strict=True)]).x.clip(*ends)
    places = dict(
        zip(order, (float(place) + offset for place, offset in zip(fitted, offsets, strict=True)), strict=True)
    )
    return [places[k] for k in range(len(wanted))]


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
