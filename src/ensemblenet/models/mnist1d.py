"""A convolutional network for MNIST-1D."""

from __future__ import annotations

from torch import Tensor, nn

from ensemblenet.models.sources import made_with

__all__ = ["MNIST1DNet"]


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


def _convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm1d(out_channels),
        nn.ReLU(),
    )
