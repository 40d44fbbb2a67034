"""Small pictures of a network's inputs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ensemblenet.reports.figures import Figure
from ensemblenet.reports.network_figures import draw_signal

__all__ = ["glimpse", "thumbnail"]

_LARGEST = 160  # pixels
_FRAMES = 4


def glimpse(inputs: Tensor, ndim: int) -> Tensor:
    """The part of a batch that its pictures need: the middle one of several views, four frames of each clip.

    Args:
        inputs: (N, *), or V views of each, (N, V, *).
        ndim: dimensions of one example.

    Example:
        >>> glimpse(torch.zeros(2, 30, 3, 64, 8, 8), ndim=4).shape
        torch.Size([2, 3, 4, 8, 8])
    """
    if inputs.ndim > ndim + 1:
        inputs = inputs[:, inputs.shape[1] // 2]
    if ndim == 4:
        inputs = inputs[:, :, torch.linspace(0, inputs.shape[2] - 1, _FRAMES).round().long()]
    return inputs


def thumbnail(inputs: Tensor, preprocessing: Mapping[str, Any] | None, colour: str) -> dict[str, bytes]:
    """A picture of one example, as PNG by theme, see [`ensemblenet.reports.page.Card`][].

    Args:
        inputs: as the network takes them: a signal (T,), an image (C, H, W), or four frames (C, 4, H, W).
        preprocessing: the `mean` and `std` that they were normalised by; without these the values are stretched from
            black to white.
        colour: the colour of a signal's line.

    Returns:
        One image for each theme, or "light" alone for both; empty for inputs of another form.

    Example:
        >>> sorted(thumbnail(torch.rand(3, 8, 8), None, "red")), thumbnail(torch.rand(2, 3), None, "red")
        (['light'], {})
    """
    if inputs.ndim == 1 and len(inputs) <= 256:  # longer ones are features, not signals
        signal = Figure("signal", "", lambda: draw_signal(inputs.tolist(), colour))
        return {theme: signal.png(theme) for theme in ("light", "dark")}
    if inputs.ndim == 4 and inputs.shape[1] == _FRAMES:
        rows = [torch.cat([inputs[:, k], inputs[:, k + 1]], 2) for k in (0, 2)]
        inputs = torch.cat(rows, 1)  # four frames in two rows, (C, 2 H, 2 W)
    if inputs.ndim != 3 or inputs.shape[0] not in (1, 3):
        return {}
    pixels = (255 * _unit(inputs, preprocessing or {})).round().byte()
    image = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"light": buffer.getvalue()}


def _unit(image: Tensor, preprocessing: Mapping[str, Any]) -> Tensor:
    """Values in [0, 1]."""
    mean, std = (preprocessing.get(name) for name in ("mean", "std"))
    if mean is not None and std is not None:
        return (image * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)).clamp(0, 1)
    low, high = image.amin(), image.amax()
    return (image - low) / (high - low).clamp(min=1e-6)
