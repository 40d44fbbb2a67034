"""What studies show: tables in the terminal, figures, and one page that holds all."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from rich import box
from rich.table import Table

from ensemblenet.storage.runs import aside

__all__ = [
    "MACS_NOTE",
    "Card",
    "Cards",
    "Column",
    "Figure",
    "draw_against_cost",
    "draw_costs",
    "draw_heads",
    "draw_measures",
    "draw_pairs",
    "draw_weights",
    "results_table",
    "with_spread",
    "write_page",
]

MACS_NOTE = "MACs are multiply-adds for one example: half of what torch.utils.flop_counter counts."

Row = Mapping[str, Any]

_DPI = 192
_BLUE, _ORANGE, _GREY = "#3b82f6", "#f59e0b", "#8a8f98"
_NARROW = 5.4  # inches: what a phone shrinks stays legible
_BASE_LINE: dict[str, Any] = {"color": _ORANGE, "linestyle": "--", "linewidth": 1, "zorder": 0}
_COLOURS = {"base": _ORANGE, "ours": _BLUE}  # of what a row's `kind` names
_THEMES = {
    "light": {"ink": "#1f2328", "paper": "#ffffff", "line": "#d8dce2"},
    "dark": {"ink": "#e6e8eb", "paper": "#17191d", "line": "#3a3f47"},
}


# -- tables


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        heading: what stands above it.
        cell: a row's text.
    """

    heading: str
    cell: Callable[[Row], str]


def results_table(rows: Sequence[Row], title: str | None = None, columns: Sequence[Column] = ()) -> Table:
    """The rows of a `results.json` as a table for the terminal; without columns, those that all runs have."""
    columns = columns or _columns(rows)
    table = Table(title=title, caption=MACS_NOTE, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for k, column in enumerate(columns):
        table.add_column(column.heading, justify="right" if k else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    return table


def with_spread(row: Row, name: str, digits: int = 2) -> str:
    """Mean and standard deviation of a measure, as `1.23 ± 0.04`; nothing where a row lacks it."""
    if row.get(f"{name}_mean") is None:
        return ""
    spread = f" ± {row[f'{name}_std']:.{digits}f}" if row["seeds"] > 1 else ""
    return f"{row[f'{name}_mean']:.{digits}f}{spread}"


def _milliseconds(row: Row) -> str:
    value = row.get("milliseconds")
    return "" if value is None else f"{value:.2f}"


_SCORES = {
    "error": "error, %",
    "head_error": "one head, %",
    "gap": "GAP@20, %",
    "head_gap": "one head, %",
    "map": "mAP, %",
}


def _columns(rows: Sequence[Row]) -> list[Column]:
    """Size, the scores that rows have, and inference time where it was measured."""
    timed = [Column("ms", _milliseconds)] if any(row.get("milliseconds") is not None for row in rows) else []
    scores = [name for name in _SCORES if any(f"{name}_mean" in row for row in rows)]
    return [
        Column("method", lambda row: row["method"]),
        Column("K", lambda row: str(row["num_heads"])),
        Column("params", lambda row: f"{row['parameters']:,}"),
        Column("MACs", lambda row: f"{row['macs']:,.0f}"),
        *(Column(_SCORES[name], partial(with_spread, name=name)) for name in scores),
        Column("runs", lambda row: str(row["seeds"])),
        *timed,
    ]


# -- figures


@dataclass(frozen=True)
class Figure:
    """A figure for a page.

    Args:
        name: its file's name, without an ending.
        caption: what it shows, one or two sentences.
        draw: draws it; called once for each theme.
    """

    name: str
    caption: str
    draw: Callable[[], Drawing]

    def png(self, theme: str) -> bytes:
        """Draw it as a PNG image for the theme "light" or "dark"."""
        colours = _THEMES[theme]
        style: dict[Any, Any] = {
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": colours["line"],
            "figure.facecolor": colours["paper"],
            "axes.facecolor": colours["paper"],
            "legend.frameon": False,
            **dict.fromkeys(
                ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
                colours["ink"],
            ),
        }
        with mpl.rc_context(style):
            drawing = self.draw()
            buffer = io.BytesIO()
            drawing.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight")
        return buffer.getvalue()


def draw_costs(rows: Sequence[Row]) -> Drawing:
    """Error against parameters and against MACs, both as shares of the first row's, which is the base's."""
    base = rows[0]
    drawing = Drawing(figsize=(6.8, 3.2), layout="constrained")
    panels = drawing.subplots(1, 2, sharey=True)
    for panel, (key, label) in zip(panels, [("parameters", "parameters"), ("macs", "MACs")], strict=True):
        for row in rows:
            colour = _BLUE if row["num_heads"] > 1 else _ORANGE
            point = (row[key] / base[key], row["error_mean"])
            panel.errorbar(*point, yerr=row["error_std"], fmt="o", color=colour, capsize=4, markersize=7)
            panel.annotate(_point_name(row), point, xytext=(8, 5), textcoords="offset points", fontsize=9)
        panel.set_xlabel(f"{label}, share of the base's")
        panel.set_xlim(0, 1.25)
        panel.set_xticks([0, 0.5, 1])
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel("test error, %")
    return drawing


def _point_name(row: Row) -> str:
    return f"{row['num_heads']} heads" if row["num_heads"] > 1 else row["method"]


def draw_weights(rows: Sequence[Row], base: Row) -> Drawing:
    """Error of the ensemble and of its single heads against lambda, beside the base's."""
    drawing = Drawing(figsize=(6.8, 3.2), layout="constrained")
    axes = drawing.subplots()
    positions = range(len(rows))
    for name, label, colour, marker in [
        ("error", "ensemble", _BLUE, "o"),
        ("head_error", "single heads, mean", _GREY, "s"),
    ]:
        means, spreads = ([row[f"{name}_{part}"] for row in rows] for part in ("mean", "std"))
        axes.errorbar(positions, means, yerr=spreads, fmt=f"{marker}-", color=colour, capsize=4, label=label)
    axes.axhline(base["error_mean"], color=_ORANGE, linestyle="--", label="base")
    axes.set_xticks(list(positions), [f"{row['weight']:g}" for row in rows])
    axes.set_xlabel("λ, the co-distillation weight")
    axes.set_ylabel("test error, %")
    axes.set_yscale("log")  # single heads are far worse at λ = 0
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend()
    return drawing


def draw_pairs(row: Row) -> Drawing:
    """How often each pair of heads predicts the same class, in percent."""
    pairs = row["pairs"]
    others = [value for i, line in enumerate(pairs) for j, value in enumerate(line) if i != j]
    drawing = Drawing(figsize=(4.6, 3.4), layout="constrained")
    axes = drawing.subplots()
    shown = [[float("nan") if i == j else value for j, value in enumerate(line)] for i, line in enumerate(pairs)]
    image = axes.imshow(shown, cmap="Blues", vmin=min(others) - 0.5, vmax=max(others) + 0.5)
    for i, line in enumerate(shown):
        for j, value in enumerate(line):
            if i != j:
                ink = "white" if value > (min(others) + max(others)) / 2 else "#10233f"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=ink)
    heads = range(len(pairs))
    axes.set_xticks(heads, [f"head {k}" for k in heads])
    axes.set_yticks(heads, [f"head {k}" for k in heads])
    axes.grid(False)
    drawing.colorbar(image, label="same class, % of examples")
    return drawing


def draw_measures(rows: Sequence[Row], measures: Sequence[tuple[str, str]]) -> Drawing:
    """Measures of every method, one below the other: a panel for each measure, with the base's as a line.

    Args:
        rows: from top to bottom; those whose `kind` is "larger" are drawn hollow.
        measures: name and label of each; rows have `<name>_mean` and perhaps `<name>_std`, or lack both.
    """
    drawing = Drawing(figsize=(_NARROW, 0.9 + 0.32 * len(rows)), layout="constrained")
    panels = drawing.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for panel, (name, label) in zip(panels, measures, strict=True):
        for place, row in enumerate(rows):
            if row.get(f"{name}_mean") is not None:
                panel.errorbar(row[f"{name}_mean"], place, xerr=row.get(f"{name}_std"), **_marker(row))
                if row.get("kind") == "base":
                    panel.axvline(row[f"{name}_mean"], **_BASE_LINE)
        panel.set_xlabel(label)
        panel.xaxis.set_major_locator(MaxNLocator(7 // len(measures)))
        panel.margins(x=0.12)
    _name_lines(panels[0], rows)
    return drawing


def draw_heads(rows: Sequence[Row], label: str) -> Drawing:
    """Error of each method's prediction beside that of its single heads, mean over heads; the base's as a line."""
    several = [row for row in rows if row["num_heads"] > 1]
    drawing = Drawing(figsize=(_NARROW, 0.9 + 0.32 * len(several)), layout="constrained")
    axes = drawing.subplots()
    for place, row in enumerate(several):
        ends = (row["error_mean"], row["head_error_mean"])
        axes.plot(ends, (place, place), color=_GREY, linewidth=1.5, zorder=1)
        axes.errorbar(ends[0], place, xerr=row["error_std"], **_marker(row))
        axes.plot(ends[1], place, "s", color=_GREY, markersize=6)
    axes.axvline(rows[0]["error_mean"], **_BASE_LINE)
    if max(row["head_error_mean"] for row in several) > 4 * max(row["error_mean"] for row in rows):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    _name_lines(axes, several)
    return drawing


def draw_against_cost(rows: Sequence[Row], label: str) -> Drawing:
    """Error against parameters and against MACs, as shares of the first row's, the base's, whose error is a line.

    The base, and of methods that cost about the same the best, are named; the rest is for the table.
    """
    base = rows[0]
    drawing = Drawing(figsize=(_NARROW, 6.4), layout="constrained")
    panels = drawing.subplots(2, 1)
    for panel, (key, size) in zip(panels, [("parameters", "parameters"), ("macs", "MACs")], strict=True):
        shares = [row[key] / base[key] for row in rows]
        named: list[float] = []
        for share, row in sorted(zip(shares, rows, strict=True), key=lambda pair: pair[1]["error_mean"]):
            panel.errorbar(share, row["error_mean"], yerr=row["error_std"], **_marker(row), alpha=0.8)
            if row is base or not any(0.75 < other / share < 1 / 0.75 for other in named):
                named += [] if row is base else [share]
                panel.annotate(
                    row["method"],
                    (share, row["error_mean"] + (row["error_std"] if row is base else -row["error_std"])),
                    xytext=(0, 7 if row is base else -7),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if row is base else "top",
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


def _marker(row: Row) -> dict[str, Any]:
    colour = _COLOURS.get(row.get("kind", ""), _GREY)
    hollow = {"markerfacecolor": mpl.rcParams["axes.facecolor"]} if row.get("kind") == "larger" else {}
    above = 3 if row.get("kind") in _COLOURS else 2
    return {"fmt": "o", "color": colour, "capsize": 3, "markersize": 7, "zorder": above, **hollow}


def _name_lines(axes: Any, rows: Sequence[Row]) -> None:
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", alpha=0.5)


# -- the page


@dataclass(frozen=True)
class Card:
    """One example on a page: a picture, and some lines of text.

    Args:
        picture: PNG images for the themes "light" and "dark"; one image for both under "light" alone, none if empty.
        title: the first line.
        lines: what stands below it.
    """

    picture: Mapping[str, bytes]
    title: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Cards:
    """Examples side by side, as many as the screen is wide enough for."""

    caption: str
    cards: Sequence[Card]


def write_page(
    path: Path,
    title: str,
    summary: str,
    rows: Sequence[Row],
    sections: Mapping[str, Sequence[Figure | Cards]],
    notes: Sequence[str],
    environment: Mapping[str, Any],
    columns: Sequence[Column] = (),
    lead: Figure | None = None,
    figure_files: bool = True,
) -> None:
    """Write one self-contained HTML page, and each figure beside it as a PNG file.

    Args:
        path: the page's file.
        title: its heading.
        summary: the result in a sentence or two.
        rows: of the table.
        sections: figures by heading, drawn for light and dark screens; the files beside the page are the light ones.
        notes: how it was measured, one paragraph each.
        environment: versions and machine.
        columns: of the table; without any it has those that runs have in common.
        lead: a figure to stand before the table.
        figure_files: whether to write the files beside the page.
    """

    def show(shown: Figure | Cards) -> str:
        if isinstance(shown, Cards):
            return _cards_html(shown)
        images = {theme: shown.png(theme) for theme in _THEMES}
        if figure_files:
            with aside(path.with_name(f"{shown.name}.png")) as unfinished:
                unfinished.write_bytes(images["light"])
        return _figure_html(shown.caption, images)

    page = Template(_PAGE).substitute(
        title=escape(title),
        summary=escape(summary),
        lead=show(lead) if lead else "",
        table=_table_html(rows, columns or _columns(rows)),
        macs_note=escape(MACS_NOTE),
        sections="\n".join(
            f'<h2>{escape(heading)}</h2>\n<div class="figures">{"".join(map(show, shown))}</div>'
            for heading, shown in sections.items()
        ),
        notes="\n".join(f"<p>{escape(note)}</p>" for note in notes),
        environment=_environment_html(environment),
    )
    with aside(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def _table_html(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    head = "".join(f"<th>{escape(column.heading)}</th>" for column in columns)
    body = "\n".join(
        f'<tr class="{escape(row.get("kind", ""))}">'
        + "".join(f"<td>{escape(column.cell(row))}</td>" for column in columns)
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure_html(caption: str, images: Mapping[str, bytes]) -> str:
    width = _width(images["light"])
    wide = ' class="wide"' if width > 1.1 * _NARROW * 96 else ""
    picture = _picture_html(images, caption, f'{wide} width="{width}"')
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _cards_html(cards: Cards) -> str:
    shown = "".join(
        f'<div class="card">{_picture_html(card.picture, card.title) if card.picture else ""}'
        f"<b>{escape(card.title)}</b>{''.join(f'<span>{escape(line)}</span>' for line in card.lines)}</div>"
        for card in cards.cards
    )
    caption = f"<figcaption>{escape(cards.caption)}</figcaption>"
    return f'<figure><div class="cards">{shown}</div>{caption}</figure>'


def _picture_html(images: Mapping[str, bytes], text: str, size: str = "") -> str:
    sources = {theme: f"data:image/png;base64,{base64.b64encode(png).decode()}" for theme, png in images.items()}
    image = f'<img{size} src="{sources["light"]}" alt="{escape(text)}">'
    if "dark" not in sources:
        return image
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{sources["dark"]}">'
    return f"<picture>{dark}{image}</picture>"


def _width(png: bytes) -> int:
    """The width to show an image at, in CSS pixels: it has more, for sharp screens."""
    return int.from_bytes(png[16:20]) * 96 // _DPI


def _environment_html(environment: Mapping[str, Any]) -> str:
    flat = {
        key: ", ".join(f"{name} {number}" for name, number in value.items()) if isinstance(value, Mapping) else value
        for key, value in environment.items()
        if value != []
    }
    return "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in flat.items())


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ink: #1f2328; --paper: #ffffff; --soft: #f4f5f7; --line: #d8dce2; --quiet: #5b626c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #17191d; --soft: #22252b; --line: #3a3f47; --quiet: #a3aab4; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
.summary { font-size: 1.15rem; padding: 1rem 1.25rem; margin: 0; }
.summary { background: var(--soft); border-radius: .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--quiet); font-size: .85rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
td:first-child { white-space: normal; min-width: 14.5rem; }
@media (max-width: 40rem) { td:first-child { min-width: 8rem; } }
tr.base td:first-child { color: #c2760a; font-weight: 600; }
tr.ours td:first-child { color: #3b82f6; font-weight: 600; }
tr.larger td, tr.failed td { color: var(--quiet); }
.summary + figure { margin: 2rem 0; }
.quiet, figcaption, dd, dt { color: var(--quiet); font-size: .9rem; }
figure { margin: 0 0 2.5rem; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .5rem; max-width: 44rem; }
.figures { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.figures figure { margin-bottom: 1.5rem; }
figure:has(.wide, .cards) { grid-column: 1 / -1; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.card { background: var(--soft); border-radius: .6rem; padding: .6rem; font-size: .85rem; line-height: 1.4; }
.card img { width: 100%; image-rendering: pixelated; border-radius: .3rem; margin-bottom: .3rem; }
.card b, .card span { display: block; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="summary">$summary</p>
$lead
<h2>Results</h2>
<div class="scroll">$table</div>
<p class="quiet">$macs_note</p>
$sections
<h2>How it was measured</h2>
$notes
<h2>Environment</h2>
<dl>$environment</dl>
</main>
</body>
</html>
"""
