"""Bytes to normalized numbers, where they are used: a batch goes to its device as bytes, a quarter of the memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["NormalizeBytes"]


@dataclass(frozen=True)
class NormalizeBytes:
    """Normalizes the inputs of a batch, wherever they lie; those that are numbers already stay as they are.

    Args:
        mean: of each channel, of pixels in [0, 1].
        std: standard deviation of each channel.
        behind: dimensions behind the one of channels: 2 of images, 3 of videos.

    Example:
        >>> images = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
        >>> NormalizeBytes([0.5], [0.5])([images, torch.zeros(1)])[0].flatten().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    mean: Sequence[float]
    std: Sequence[float]
    behind: int = 2

    @classmethod
    def of(cls, preprocessing: Mapping[str, Any], behind: int = 2) -> NormalizeBytes:
        """The one that a description of preprocessing names."""
        return cls(tuple(preprocessing["mean"]), tuple(preprocessing["std"]), behind)

    def __call__(self, batch: Sequence[Any]) -> list[Any]:
        """A batch with its inputs, the first part, normalized."""
        inputs, *rest = batch
        if inputs.dtype == torch.uint8:  # in the order of torchvision's transforms: equal to the bit
            shape = (-1, *[1] * self.behind)
            mean, std = (inputs.new_tensor(of, dtype=torch.float32).view(shape) for of in (self.mean, self.std))
            inputs = inputs.float().div_(255).sub_(mean).div_(std)
        return [inputs, *rest]

    def reader(self, read: Callable[[Path], Tensor]) -> Callable[[Path], Tensor]:
        """A reader of files that gives bytes, as one that gives numbers."""
        return _Normalized(read, self)


@dataclass(frozen=True)
class _Normalized:
    read: Callable[[Path], Tensor]
    normalize: NormalizeBytes

    def __call__(self, path: Path) -> Tensor:
        return self.normalize([self.read(path)])[0]
