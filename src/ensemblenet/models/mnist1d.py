"""Convolutional networks for MNIST-1D."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ensemblenet.models.sources import made_with

__all__ = ["MNIST1DNet", "MNIST1DResNet"]


class MNIST1DNet(nn.Module):
    """Four 1-d convolutions with batch normalisation, global average pooling and a linear classifier.

    Args:
        width: channels of the first two convolutions; the last two have twice as many.
        num_classes: outputs.

    Shape:
        - input: (N, L) or (N, 1, L), with L = 40 for MNIST-1D.
        - output: (N, num_classes).

    Example:
        >>> import torch
        >>> MNIST1DNet(width=8)(torch.zeros(2, 40)).shape
        torch.Size([2, 10])
    """

    input_shape = (40,)

    def __init__(self, width: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        self.arguments = made_with(locals())
        self.conv1 = _convolution(1, width, kernel_size=5, stride=1)
        self.conv2 = _convolution(width, width, kernel_size=5, stride=2)
        self.conv3 = _convolution(width, 2 * width, kernel_size=3, stride=2)
        self.conv4 = _convolution(2 * width, 2 * width, kernel_size=3, stride=2)
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify signals; see the class for shapes."""
        x = x.flatten(1).unsqueeze(1)
        x = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return self.classifier(self.pool(x).flatten(1))


class MNIST1DResNet(nn.Module):
    """A residual network of 1-d convolutions: a stem and three stages of basic blocks, each of which halves the length.

    Args:
        width: channels of the stem and the first stage; the last two stages have twice as many.
        blocks: of each stage.
        num_classes: outputs.

    Shape:
        - input: (N, L) or (N, 1, L), with L = 40 for MNIST-1D.
        - output: (N, num_classes).

    Example:
        >>> import torch
        >>> MNIST1DResNet(width=8)(torch.zeros(2, 40)).shape
        torch.Size([2, 10])
    """

    input_shape = (40,)

    def __init__(self, width: int = 32, blocks: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.arguments = made_with(locals())
        widths = (width, width, 2 * width, 2 * width)
        self.stem = _convolution(1, width, kernel_size=5, stride=1)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_BasicBlock(before, after, 2), *(_BasicBlock(after, after, 1) for _ in range(1, blocks)))
                for before, after in pairwise(widths)
            )
        )
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify signals; see the class for shapes."""
        x = self.stages(self.stem(x.flatten(1).unsqueeze(1)))
        return self.classifier(self.pool(x).flatten(1))


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, out_channels, 3, stride)
        self.conv2 = nn.Conv1d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm1d(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv1d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm1d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm2(self.conv2(self.conv1(x))) + self.shortcut(x))


def _convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm1d(out_channels),
        nn.ReLU(),
    )
