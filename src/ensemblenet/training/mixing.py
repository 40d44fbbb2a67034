"""Soft targets: label smoothing, mixup and CutMix, for softmax and for sigmoid losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["Mixing", "soft_targets"]

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of whole batches, by `timm.data.Mixup`.

    Args:
        mixup: alpha of mixup's Beta distribution; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        probability: of mixing a batch at all.
        switch: the share of mixed batches that CutMix takes where both are on.

    Raises:
        ValueError: a number out of its range, or neither of the two.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0 or self.mixup + self.cutmix == 0:
            raise ValueError(f"Mixing needs mixup or cutmix above 0, got {self.mixup} and {self.cutmix}.")
        for name in ("probability", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")

    def mixer(self, num_classes: int) -> Mix:
        """What mixes images (N, 3, H, W) or clips (N, 3, T, H, W), in place, with labels (N,).

        Labels become shares of classes, (N, C). An odd batch loses its last example.

        Example:
            >>> import torch
            >>> mix = Mixing(mixup=0.2).mixer(num_classes=3)
            >>> images, targets = mix(torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1]))
            >>> images.shape, targets.shape, bool(targets.sum(1).allclose(torch.ones(4)))
            (torch.Size([4, 3, 8, 8]), torch.Size([4, 3]), True)
        """
        from timm.data.mixup import Mixup  # slow to import

        mix: Any = Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.probability,
            switch_prob=self.switch,
            label_smoothing=0.0,  # the loss's affair
            num_classes=num_classes,
        )

        def mix_even(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            even = images[: len(images) // 2 * 2]
            frames_as_channels = even.flatten(1, -3)  # timm takes the last two of four dimensions for space
            mixed, shares = mix(frames_as_channels, labels[: len(even)])
            return mixed.view_as(even), shares

        return mix_even


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Shares of classes (N, C), float32, moved by `smoothing` of the way to 1 / C.

    Args:
        labels: class indices (N,), or shares already, (N, C).
        num_classes: C.
        smoothing: in [0, 1].

    Example:
        >>> import torch
        >>> soft_targets(torch.tensor([1]), 2, smoothing=0.2)
        tensor([[0.1000, 0.9000]])
    """
    shares = labels if labels.is_floating_point() else one_hot(labels, num_classes).float()
    return shares + smoothing * (1 / num_classes - shares)
