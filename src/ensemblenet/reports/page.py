"""One self-contained HTML page: a table, figures for light and dark screens, and notes."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ensemblenet.reports.figures import DPI, NARROW, THEMES, Figure
from ensemblenet.reports.tables import COST_NOTE, Column, results_columns
from ensemblenet.storage.atomic import atomic_path

__all__ = ["Card", "Cards", "write_page"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """One example on a page: a picture, and some lines of text.

    Args:
        picture: PNG images for the themes "light" and "dark"; one image for both under "light" alone, none if empty.
        title: the first line.
        lines: the text below it.
    """

    picture: Mapping[str, bytes]
    title: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Cards:
    """Examples side by side, as many as the screen is wide enough for.

    Args:
        caption: a sentence below them.
        cards: the examples.
    """

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
        rows: the rows of the table; a row's `kind` chooses its colour.
        sections: figures by heading, drawn for light and dark screens; the files beside the page are the light ones.
        notes: paragraphs on how it was measured.
        environment: versions and machine.
        columns: the columns of the table; if empty, [`ensemblenet.reports.tables.results_columns`][].
        lead: a figure to stand before the table.
        figure_files: False writes the page alone, without the files beside it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "page.html")
        >>> rows = [{"method": "a < b"}]
        >>> write_page(path, "Title", "Summary.", rows, {}, [], {}, [Column("method", lambda row: row["method"])])
        >>> "<td>a &lt; b</td>" in path.read_text()
        True
    """

    def shown(item: Figure | Cards) -> Cards | dict[str, Any]:
        if isinstance(item, Cards):
            return item
        images = {theme: item.png(theme) for theme in THEMES}
        if figure_files:
            with atomic_path(path.with_name(f"{item.name}.png")) as unfinished:
                unfinished.write_bytes(images["light"])
        width = int.from_bytes(images["light"][16:20]) * 96 // DPI  # in CSS pixels; a PNG begins with its size
        return {"caption": item.caption, "images": images, "width": width, "wide": width > 1.1 * NARROW * 96}

    page = _template().render(
        title=title,
        summary=summary,
        lead=None if lead is None else shown(lead),
        columns=columns or results_columns(rows),
        rows=rows,
        macs_note=COST_NOTE,
        sections={heading: [shown(item) for item in items] for heading, items in sections.items()},
        notes=notes,
        environment={key: value for key, value in environment.items() if value != []},
    )
    with atomic_path(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("ensemblenet.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = lambda image: f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return environment.get_template("page.html")
