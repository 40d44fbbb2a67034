"""The residual networks for small images of He et al. 2015, section 4.2."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from ensemblenet.models.sources import made_with

__all__ = ["CifarResNet"]


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A residual network for images of 16 to 64 pixels: a stem and three stages of basic blocks.

    The second and third stage halve the resolution and double the channels. Where a block changes the shape,
    a 1x1 convolution takes the place of the original's zero-padded shortcut.

    Args:
        depth: number of weighted layers, 6n + 2 for n blocks a stage: 8, 14, 20, 32, 44, 56, 110.
        width: channels of the first stage, 16 in the original.
        num_classes: outputs.
        in_channels: channels of the images.

    Shape:
        - input: (N, in_channels, H, W).
        - output: (N, num_classes).

    Raises:
        ValueError: `depth` is not 6n + 2.

    Example:
        >>> CifarResNet(depth=8, width=8)(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int = 20, width: int = 16, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.arguments = made_with(locals())
        self.input_shape = (in_channels, 32, 32)
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, ...), got {depth}.")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.Sequential(
            _stage(width, width, blocks, stride=1),
            _stage(width, 2 * width, blocks, stride=2),
            _stage(2 * width, 4 * width, blocks, stride=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * width, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images; see the class for shapes."""
        return self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = _BasicBlock(in_channels, out_channels, stride)
    rest = [_BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(OrderedDict((f"block{i}", block) for i, block in enumerate([first, *rest])))


def _initialize(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
