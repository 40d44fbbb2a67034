"""What studies show: tables in the terminal, figures, and one page that holds all."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Drawing
from rich import box
from rich.table import Table

from ensemblenet.training.run import aside

__all__ = ["MACS_NOTE", "Figure", "draw_costs", "draw_pairs", "draw_weights", "results_table", "write_page"]

MACS_NOTE = "MACs are multiply-adds for one example: half of what torch.utils.flop_counter counts."

Row = Mapping[str, Any]

_DPI = 192
_BLUE, _ORANGE, _GREY = "#3b82f6", "#f59e0b", "#8a8f98"
_THEMES = {
    "light": {"ink": "#1f2328", "paper": "#ffffff", "line": "#d8dce2"},
    "dark": {"ink": "#e6e8eb", "paper": "#17191d", "line": "#3a3f47"},
}


# -- tables


def results_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """The rows of a `results.json` as a table for the terminal."""
    table = Table(title=title, caption=MACS_NOTE, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


_COLUMNS = (
    "method",
    "K",
    "params",
    "MACs",
    "error, %",
    "one head, %",
    "runs",
    "ms",
)


def _cells(row: Row) -> tuple[str, ...]:
    milliseconds = row.get("milliseconds")
    return (
        row["method"],
        str(row["num_heads"]),
        f"{row['parameters']:,}",
        f"{row['macs']:,.0f}",
        _with_spread(row, "error"),
        _with_spread(row, "head_error"),
        str(row["seeds"]),
        "" if milliseconds is None else f"{milliseconds:.2f}",
    )


def _with_spread(row: Row, name: str) -> str:
    spread = f" ± {row[f'{name}_std']:.2f}" if row["seeds"] > 1 else ""
    return f"{row[f'{name}_mean']:.2f}{spread}"


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
    drawing.colorbar(image, label="same class, % of test examples")
    return drawing


# -- the page


def write_page(
    path: Path,
    title: str,
    summary: str,
    rows: Sequence[Row],
    figures: Sequence[Figure],
    notes: Sequence[str],
    environment: Mapping[str, Any],
) -> None:
    """Write one self-contained HTML page, and each figure beside it as a PNG file.

    Args:
        path: the page's file.
        title: its heading.
        summary: the result in a sentence or two.
        rows: of the table.
        figures: drawn for light and dark screens; the files beside the page are the light ones.
        notes: how it was measured, one paragraph each.
        environment: versions and machine.
    """
    shown = []
    for figure in figures:
        images = {theme: figure.png(theme) for theme in _THEMES}
        with aside(path.with_name(f"{figure.name}.png")) as unfinished:
            unfinished.write_bytes(images["light"])
        shown.append(_figure_html(figure.caption, images))
    page = Template(_PAGE).substitute(
        title=escape(title),
        summary=escape(summary),
        table=_table_html(rows),
        macs_note=escape(MACS_NOTE),
        figures="\n".join(shown),
        notes="\n".join(f"<p>{escape(note)}</p>" for note in notes),
        environment=_environment_html(environment),
    )
    with aside(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def _table_html(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in _COLUMNS)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure_html(caption: str, images: Mapping[str, bytes]) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(images[theme]).decode()}" for theme in ("light", "dark"))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img width="{_width(images["light"])}" src="{light}" alt="{escape(caption)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


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
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; text-align: right; white-space: nowrap; }
tr { border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--quiet); font-size: .85rem; }
th:first-child, td:first-child { text-align: left; }
.quiet, figcaption, dd, dt { color: var(--quiet); font-size: .9rem; }
figure { margin: 0 0 2.5rem; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .5rem; max-width: 44rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="summary">$summary</p>
<h2>Results</h2>
<div class="scroll">$table</div>
<p class="quiet">$macs_note</p>
<h2>Figures</h2>
$figures
<h2>How it was measured</h2>
$notes
<h2>Environment</h2>
<dl>$environment</dl>
</main>
</body>
</html>
"""
