"""Figures for light and dark screens, and what the drawings of studies and of networks share."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.figure import Figure as Drawing
from PIL import Image

__all__ = ["BLUE", "DPI", "GREY", "NARROW", "ORANGE", "THEMES", "Figure", "draw_pairs"]

DPI = 192
_TONES = 128
BLUE, ORANGE, GREY = "#3b82f6", "#f59e0b", "#8a8f98"
NARROW = 5.4  # inches: what a phone shrinks stays legible
THEMES = {
    "light": {"ink": "#1f2328", "paper": "#ffffff", "line": "#d8dce2"},
    "dark": {"ink": "#e6e8eb", "paper": "#17191d", "line": "#3a3f47"},
}


@dataclass(frozen=True)
class Figure:
    """A figure for a page.

    Args:
        name: its file's name, without an ending.
        caption: one or two sentences below it.
        draw: draws it; called once for each theme.

    Example:
        >>> Figure("empty", "Nothing.", Drawing).png("dark")[1:4]
        b'PNG'
    """

    name: str
    caption: str
    draw: Callable[[], Drawing]

    def png(self, theme: str) -> bytes:
        """Draw it as a PNG image for the theme "light" or "dark"."""
        image, small = Image.open(io.BytesIO(self.image(theme, "png"))), io.BytesIO()
        image.convert("RGB").quantize(_TONES).save(small, "PNG", optimize=True)  # a third of the bytes
        return small.getvalue()

    def image(self, theme: str, kind: Literal["png", "svg"]) -> bytes:
        """Draw it as an image of a kind for the theme "light" or "dark"."""
        colours = THEMES[theme]
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
            "svg.hashsalt": self.name,
            **dict.fromkeys(
                ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
                colours["ink"],
            ),
        }
        with mpl.rc_context(style):
            drawing = self.draw()
            buffer = io.BytesIO()
            undated = {"Date": None} if kind == "svg" else {}  # the same drawing, the same file
            drawing.savefig(buffer, format=kind, dpi=DPI, bbox_inches="tight", metadata=undated)
        return buffer.getvalue()


def draw_pairs(pairs: Sequence[Sequence[float]]) -> Drawing:
    """How often each pair of heads predicts the same class.

    Args:
        pairs: shares in percent, K lists of K.

    Example:
        >>> [text.get_text() for text in draw_pairs([[100, 80], [80, 100]]).axes[0].texts]
        ['80.0', '80.0']
    """
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
