"""Bytes to normalized numbers, where they are used: a batch goes to its device as bytes, a quarter of the memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

__all__ = ["Erased", "NormalizeBytes"]


class Erased(NamedTuple):
    """Images as bytes, and what stands in some of their pixels when they have been normalized: random erasing.

    Attributes:
        pixels: (N, C, H, W), uint8; of one image (C, H, W).
        where: (M,), int32, the numbers of those pixels, counted over all N H W.
        noise: (M, C), float32.
    """

    pixels: Tensor
    where: Tensor
    noise: Tensor


def _collate_erased(images: Sequence[Erased], **_: Any) -> Erased:
    first = [number * image.pixels[0].numel() for number, image in enumerate(images)]
    return Erased(
        default_collate([image.pixels for image in images]),
        torch.cat([image.where + begin for image, begin in zip(images, first, strict=True)]),
        torch.cat([image.noise for image in images]),
    )


default_collate_fn_map[Erased] = _collate_erased  # how PyTorch is told of a type of one's own


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
        if not isinstance(inputs, Erased):
            return [self._normalized(inputs) if inputs.dtype == torch.uint8 else inputs, *rest]
        normalized = self._normalized(inputs.pixels)
        by_pixel = normalized.view(*normalized.shape[:2], -1)  # (N, C, H W)
        size = by_pixel.shape[2]
        by_pixel[inputs.where // size, :, inputs.where % size] = inputs.noise
        return [normalized, *rest]

    def _normalized(self, pixels: Tensor) -> Tensor:
        shape = (-1, *[1] * self.behind)
        mean, std = (pixels.new_tensor(of, dtype=torch.float32).view(shape) for of in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)  # as torchvision's transforms do it: equal to the bit

    def reader(self, read: Callable[[Path], Tensor]) -> Callable[[Path], Tensor]:
        """A reader of files that gives bytes, as one that gives numbers."""
        return _Normalized(read, self)


@dataclass(frozen=True)
class _Normalized:
    read: Callable[[Path], Tensor]
    normalize: NormalizeBytes

    def __call__(self, path: Path) -> Tensor:
        return self.normalize([self.read(path)])[0]
