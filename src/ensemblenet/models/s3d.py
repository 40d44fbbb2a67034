"""The separable 3-d Inception networks of Xie et al. 2018, arXiv 1712.04851."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ensemblenet.models.sources import made_with

__all__ = ["S3D"]

# Channels of the branches of each Inception block: 1x1; 1x1 and 3x3; 1x1 and 3x3; pooling and 1x1.
_STAGES = [
    [(64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)],
    [
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ],
    [(256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)],
]
_LEAST = 4  # channels of a layer of a narrow network


class S3D(nn.Module):
    """S3D, an Inception network that convolves in space and then in time where I3D does both at once; or S3D-G.

    At full width, with 400 classes and 16 frames of 224 x 224 pixels, S3D has 8,320,048 parameters and 17.98 billion
    multiply-adds, as torchvision's has. S3D-G gates the stem and every branch where it ends: features are multiplied
    with sigmoid(Wm + b), where m is their mean over time and space. The places are those of the authors' code,
    `s3dg.py` in TensorFlow's models. It has 9,545,056 parameters.

    Args:
        num_classes: outputs.
        gating: S3D-G.
        width: the share of its channels that every layer has, for small networks; it keeps at least 4.
        dropout: of the features that the classifier reads.

    Shape:
        - input: (N, 3, T, H, W).
        - output: (N, num_classes).

    Raises:
        ValueError: `width` is not above 0.

    Example:
        >>> S3D(num_classes=5, gating=True, width=0.125)(torch.zeros(2, 3, 8, 32, 32)).shape
        torch.Size([2, 5])
    """

    input_shape = (3, 16, 224, 224)

    def __init__(self, num_classes: int = 400, gating: bool = False, width: float = 1.0, dropout: float = 0.2) -> None:
        super().__init__()
        self.arguments = made_with(locals())
        if not width > 0:
            raise ValueError(f"width must be above 0, got {width}.")
        narrow, wide = _scaled((64, 192), width)
        self.stem = nn.Sequential(
            _separable(3, narrow, size=7, stride=2),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
            _convolution(narrow, narrow),
            _separable(narrow, wide, size=3),
            _gate(wide, gating),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        )
        # the last pooling rounds up, as the authors' padding does: clips may have as few as 4 frames
        pools = [nn.Identity(), nn.MaxPool3d(3, stride=2, padding=1), nn.MaxPool3d(2, ceil_mode=True)]
        self.stages = nn.Sequential()
        for pool, stage in zip(pools, _STAGES, strict=True):
            self.stages.append(pool)
            for sizes in stage:
                block = _Inception(wide, _scaled(sizes, width), gating)
                self.stages.append(block)
                wide = block.out_channels
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(wide, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify clips; see the class for shapes."""
        x = self.pool(self.stages(self.stem(x))).flatten(1)
        return self.classifier(self.dropout(x))


class _Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self, in_channels: int, sizes: tuple[int, ...], gating: bool) -> None:
        super().__init__()
        one, middle1, large1, middle2, large2, pooled = sizes
        self.out_channels = one + large1 + large2 + pooled
        self.branch1 = nn.Sequential(_convolution(in_channels, one), _gate(one, gating))
        self.branch2 = nn.Sequential(
            _convolution(in_channels, middle1), _separable(middle1, large1, size=3), _gate(large1, gating)
        )
        self.branch3 = nn.Sequential(
            _convolution(in_channels, middle2), _separable(middle2, large2, size=3), _gate(large2, gating)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool3d(3, stride=1, padding=1), _convolution(in_channels, pooled), _gate(pooled, gating)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class _Gate(nn.Module):
    """Every channel weighted by what all channels are on average."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x.mean((2, 3, 4))).sigmoid()[:, :, None, None, None]


def _gate(channels: int, gating: bool) -> nn.Module:
    return _Gate(channels) if gating else nn.Identity()


def _scaled(sizes: tuple[int, ...], width: float) -> tuple[int, ...]:
    return tuple(max(min(_LEAST, size), round(width * size)) for size in sizes)


def _separable(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution in space, and one in time."""
    return nn.Sequential(
        _convolution(in_channels, out_channels, (1, size, size), (1, stride, stride)),
        _convolution(out_channels, out_channels, (size, 1, 1), (stride, 1, 1)),
    )


def _convolution(
    in_channels: int, out_channels: int, size: tuple[int, ...] = (1, 1, 1), stride: tuple[int, ...] = (1, 1, 1)
) -> nn.Sequential:
    padding = tuple(length // 2 for length in size)
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, size, stride, padding, bias=False),  # pyright: ignore[reportArgumentType]
        nn.BatchNorm3d(out_channels, eps=1e-3),
        nn.ReLU(),
    )
