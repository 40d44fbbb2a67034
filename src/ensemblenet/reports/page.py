"""One self-contained HTML page: figures for light and dark screens, tables, and notes."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ensemblenet.reports.figures import DPI, THEMES, Figure
from ensemblenet.reports.tables import Column
from ensemblenet.storage.atomic import atomic_path

__all__ = ["Card", "Cards", "Section", "Table", "write_page"]

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


@dataclass(frozen=True)
class Table:
    """A table; a narrow screen shows each of its rows as a card, with nothing left out.

    Args:
        rows: a row's `kind` chooses its colour.
        columns: the first names the rows.
        note: a sentence below it.
    """

    rows: Sequence[Row]
    columns: Sequence[Column]
    note: str = ""


Section = Sequence[Figure | Cards | Table]


def write_page(
    path: Path,
    title: str,
    summary: str,
    lead: Sequence[Figure],
    sections: Mapping[str, Section],
    notes: Sequence[str],
    environment: Mapping[str, Any],
    figure_files: bool = True,
) -> None:
    """Write one self-contained HTML page, and each figure beside it as a PNG file.

    Args:
        path: the page's file.
        title: its heading.
        summary: the result in a sentence or two.
        lead: figures that stand side by side before all else.
        sections: tables and figures by heading.
        notes: paragraphs on how it was measured.
        environment: versions and machine.
        figure_files: False writes the page alone, without the files beside it, which are for light screens.

    Example:
        >>> import tempfile
        >>> from operator import itemgetter
        >>> path = Path(tempfile.mkdtemp(), "page.html")
        >>> columns = [Column(name, itemgetter(name)) for name in ("method", "error")]
        >>> table = Table([{"method": "a < b", "error": "2.0"}], columns)
        >>> write_page(path, "Title", "Summary.", [], {"Results": [table]}, [], {})
        >>> '<th scope="row">a &lt; b</th>' in path.read_text(), '<td data-label="error">2.0</td>' in path.read_text()
        (True, True)
    """

    def shown(item: Figure | Cards | Table) -> Cards | Table | dict[str, Any]:
        if not isinstance(item, Figure):
            return item
        images = {theme: item.png(theme) for theme in THEMES}
        if figure_files:
            with atomic_path(path.with_name(f"{item.name}.png")) as unfinished:
                unfinished.write_bytes(images["light"])
        width = int.from_bytes(images["light"][16:20]) * 96 // DPI  # in CSS pixels; a PNG begins with its size
        return {"caption": item.caption, "images": images, "width": width}

    page = _template().render(
        title=title,
        summary=summary,
        lead=[shown(figure) for figure in lead],
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
