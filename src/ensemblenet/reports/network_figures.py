"""The drawings of a report about trained networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import EngFormatter, MaxNLocator

from ensemblenet.evaluation.findings import Bins
from ensemblenet.metrics.scores import SCORES
from ensemblenet.reports.figures import NARROW

__all__ = [
    "Design",
    "Line",
    "Looks",
    "Panel",
    "choose_looks",
    "draw_classes",
    "draw_curves",
    "draw_design",
    "draw_reliability",
    "draw_score_against_macs",
    "draw_signal",
    "draw_stopping",
]

_ORANGES = ("#f59e0b", "#b45309", "#facc15")  # of bases
_BLUES = ("#3b82f6", "#10b981", "#a855f7", "#ec4899")  # of multi-headed models
_MOST_HEADS = 4
_FEW = 8  # points of a curve
_SMALL: dict[str, Any] = {"fontsize": 10}


@dataclass(frozen=True)
class Looks:
    """The legend name and the colour of a run, the same in every figure.

    Args:
        name: its name in legends.
        colour: the colour of its marks.
    """

    name: str
    colour: str


def choose_looks(names: Sequence[str], converted: Sequence[bool]) -> list[Looks]:
    """Legend name and colour of each run; the timestamp is dropped if the rest is unique.

    Args:
        names: the names of the runs.
        converted: True for each multi-headed model; bases are orange.

    Example:
        >>> [looks.name for looks in choose_looks(["mlp-20250131-120000", "heads"], [False, True])]
        ['mlp', 'heads']
    """
    short = [re.sub(r"-\d{8}-\d{6}(-\d+)?$", "", name) for name in names]
    shown = [brief if short.count(brief) == 1 else name for brief, name in zip(short, names, strict=True)]
    blues, oranges = cycle(_BLUES), cycle(_ORANGES)
    return [Looks(name, next(blues if several else oranges)) for name, several in zip(shown, converted, strict=True)]


Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A panel of training curves.

    Args:
        label: the label of its axis.
        curve: the name of the curve to draw as a line.
        dashed: the name of one to draw beside it; empty for none.
        shown: what is drawn for a value.
    """

    label: str
    curve: str
    dashed: str = ""
    shown: Callable[[float], float] = float


def draw_score_against_macs(runs: Sequence[tuple[Looks, Sequence[Mapping[str, Any]]]], score: str) -> Drawing:
    """A score against MACs: of whole networks (large), of the first k heads (a line), of single heads (squares).

    Args:
        runs: each with its rows, see [`ensemblenet.evaluation.scoring.score`][].
        score: the rows' key, a score's name.
    """
    drawing = Drawing(figsize=(NARROW, 3.4), layout="constrained")
    axes = drawing.subplots()
    for looks, rows in runs:
        whole = rows[0]
        firsts = [row for row in rows if row["method"] in ("head 0", "ensemble") or row["method"].startswith("first")]
        firsts = sorted(firsts, key=lambda row: row["num_heads"])
        heads = [row for row in rows if row["method"].startswith("head")]
        axes.plot(*_points(firsts, score), ".-", color=looks.colour, linewidth=1.5)
        axes.plot(*_points(heads, score), "s", color=looks.colour, markersize=5, alpha=0.5)
        axes.plot(*_points([whole], score), "o", color=looks.colour, markersize=9, label=looks.name)
    axes.set_xlabel("MACs")
    axes.set_ylabel(SCORES[score].label)
    axes.set_xlim(left=0)
    axes.margins(x=0.1, y=0.12)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _legend_above(drawing, axes)
    return drawing


def _points(rows: Sequence[Mapping[str, Any]], score: str) -> tuple[list[float], list[float]]:
    return [row["macs"] for row in rows], [SCORES[score].shown(row[score]) for row in rows]


def draw_stopping(runs: Sequence[tuple[Looks, Line, Line, tuple[float, float]]], label: str) -> Drawing:
    """A score against the mean MACs of an example if heads run one by one and stop early.

    Args:
        runs: each with the points (mean MACs, score in percent) of stopping by confidence, of stopping once heads
            agree, and of the whole network.
        label: the score's name, with its unit.
    """
    drawing = Drawing(figsize=(NARROW, 3.4), layout="constrained")
    axes = drawing.subplots()
    for looks, by_confidence, by_agreement, whole in runs:
        if by_confidence:
            axes.plot(*zip(*by_confidence, strict=True), "-", color=looks.colour, label=f"{looks.name}: confident")
        if by_agreement:
            points = zip(*by_agreement, strict=True)
            axes.plot(*points, "^--", color=looks.colour, alpha=0.6, label=f"{looks.name}: agreed")
        axes.plot(*whole, "o", color=looks.colour, markersize=9, label=looks.name)
    axes.set_xlabel("mean MACs of an example")
    axes.set_ylabel(label)
    axes.margins(x=0.08, y=0.12)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _legend_above(drawing, axes)
    return drawing


def draw_curves(runs: Sequence[tuple[Looks, Mapping[str, Line]]], panels: Sequence[Panel]) -> Drawing:
    """Training curves, one panel below the other.

    Args:
        runs: each with its curves by name, points (step, value).
        panels: the panels from top to bottom.
    """
    drawing = Drawing(figsize=(NARROW, 0.4 + 2 * len(panels)), layout="constrained")
    axes = drawing.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        for looks, curves in runs:
            for name, style in ((panel.curve, "-"), (panel.dashed, "--")):
                if name in curves:
                    points = [(step, panel.shown(value)) for step, value in curves[name]]
                    label = looks.name if style == "-" else None
                    mark = "." if len(points) < _FEW else ""  # one point alone makes no line
                    ax.plot(*zip(*points, strict=True), mark + style, color=looks.colour, linewidth=1.4, label=label)
        ax.set_ylabel(panel.label)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _legend_above(drawing, axes[0])
    return drawing


def draw_reliability(runs: Sequence[tuple[Looks, Bins]]) -> Drawing:
    """How often predictions of a given confidence are right, and below it how many there are."""
    drawing = Drawing(figsize=(NARROW, 4.4), layout="constrained")
    above, below = drawing.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot((0, 100), (0, 100), ":", color=mpl.rcParams["text.color"], linewidth=1)
    for looks, bins in runs:
        confidence = [100 * value for value in bins.confidence]
        above.plot(confidence, [100 * value for value in bins.accuracy], "o-", color=looks.colour, label=looks.name)
        below.plot(confidence, [100 * value for value in bins.share], "o-", color=looks.colour, markersize=4)
    above.set_ylabel("right, %")
    above.set_ylim(0, 103)
    below.set_xlabel("confidence, %")
    below.set_ylabel("share, %")
    below.set_ylim(bottom=0)
    _legend_above(drawing, above)
    return drawing


def draw_classes(names: Sequence[str], runs: Sequence[tuple[Looks, Sequence[float]]], label: str) -> Drawing:
    """A score of each class, one below the other.

    Args:
        names: the names of the classes, from top to bottom; an empty one leaves a gap.
        runs: each with the scores of the classes, as they are shown.
        label: the score's name, with its unit.
    """
    drawing = Drawing(figsize=(NARROW, 1.1 + 0.26 * len(names)), layout="constrained")
    axes = drawing.subplots()
    places = [place for place, name in enumerate(names) if name]
    for looks, scores in runs:
        axes.plot([scores[place] for place in places], places, "o", color=looks.colour, label=looks.name, alpha=0.85)
    axes.set_yticks(places, [_cut(names[place]) for place in places])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(label)
    axes.margins(x=0.06)
    _legend_above(drawing, axes)
    return drawing


def draw_signal(values: Sequence[float], colour: str) -> Drawing:
    """A small picture of a one-dimensional signal."""
    drawing = Drawing(figsize=(1.8, 1.2), layout="constrained")
    axes = drawing.subplots()
    axes.plot(values, color=colour, linewidth=1.5)
    axes.axis("off")
    return drawing


# -- the picture of a network


@dataclass(frozen=True)
class Design:
    """The content of the picture of a multi-headed network.

    Args:
        input_shapes: of one example, by the inputs' names.
        split_shape: the shape of the trunk's output, which every head reads.
        output_shape: the shape of the prediction.
        split_at: the split point's name.
        num_heads: K.
        trunk: size of the trunk, in words; None where heads read the input.
        head: size of one head, in words.
        combine: how heads make one prediction, in words.
    """

    input_shapes: Mapping[str, tuple[int, ...]]
    split_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    split_at: str
    num_heads: int
    trunk: str | None
    head: str
    combine: str


def draw_design(design: Design, colour: str) -> Drawing:
    """Trunk and heads as boxes, with the shapes of what flows between them."""
    shown = list(range(design.num_heads))
    if design.num_heads > _MOST_HEADS:
        shown = [0, 1, None, design.num_heads - 1]
    height = float(len(shown))
    drawing = Drawing(figsize=(NARROW, 0.5 + 0.72 * height), layout="constrained")
    axes = drawing.subplots()
    axes.axis("off")
    axes.set_xlim(0, 10)
    axes.set_ylim(height, 0)
    middle, ink = height / 2, mpl.rcParams["text.color"]
    _arrow(axes, (0.0, middle), (1.7, middle))
    inputs = "\n".join(f"{_cut(name, 12)}\n{_shape(shape)}" for name, shape in design.input_shapes.items())
    axes.text(1.65, middle - 0.08, inputs, ha="right", va="bottom", **_SMALL)
    trunk = min(1.4, height - 0.2)
    text = "no trunk:\nheads read\nthe input" if design.trunk is None else f"trunk\n{design.trunk}"
    _box(axes, (1.8, middle - trunk / 2), (2.4, trunk), ink, text)
    features = f"{_shape(design.split_shape)}\nat {design.split_at}"
    axes.text(3.0, middle + trunk / 2 + 0.08, features, ha="center", va="top", **_SMALL)
    for place, head in enumerate(shown):
        centre = place + 0.5
        if head is None:
            axes.text(6.7, centre, f"… {design.num_heads} heads …", ha="center", va="center", **_SMALL)
            continue
        _box(axes, (5.5, place + 0.1), (2.4, 0.8), colour, f"head {head}\n{design.head}")
        _arrow(axes, (4.3, middle), (5.4, centre))
        _arrow(axes, (8.0, centre), (8.6, middle))
    axes.text(8.7, middle, f"{design.combine}\n{_shape(design.output_shape)}", ha="left", va="center", **_SMALL)
    return drawing


def _box(axes: Axes, corner: tuple[float, float], size: tuple[float, float], colour: str, text: str) -> None:
    style = {"boxstyle": "round,pad=0,rounding_size=0.12", "mutation_aspect": 0.6, "linewidth": 1.5}
    axes.add_patch(FancyBboxPatch(corner, *size, edgecolor=colour, facecolor="none", **style))
    axes.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha="center", va="center", **_SMALL)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    ink = mpl.rcParams["text.color"]
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "->", "color": ink, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
    )


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _cut(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _legend_above(drawing: Drawing, axes: Axes) -> None:
    """The legend above all panels, where it hides no mark."""
    handles, labels = axes.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper left", ncols=1 if len(labels) > 2 else 2, **_SMALL)
