"""Texts in files of CSV, which spreadsheets open."""

from __future__ import annotations

import re

__all__ = ["as_cell"]

_FORMULA = re.compile(r"\s*[=+@＝＋＠]|[\t\r\n]|\s*-(?![\w./ -]*$)")


def as_cell(text: str) -> str:
    """A text that spreadsheets take as a text: one that they would run as a formula gets a quote in front.

    Names of files and videos may begin with a minus; they stay as they are.

    Example:
        >>> print(as_cell("=HYPERLINK()"), as_cell("-2+3"), as_cell("-Ab_1/c.mp4"), as_cell("a=b"))
        '=HYPERLINK() '-2+3 -Ab_1/c.mp4 a=b
    """
    return f"'{text}" if _FORMULA.match(text) else text
