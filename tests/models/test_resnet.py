from __future__ import annotations

import pytest
import torch
from torch import nn

from ensemblenet.models import CifarResNet


def test_resnet20_has_the_parameters_of_its_layers() -> None:
    # He et al. 2015 report 0.27 million for depth 20.
    parameters = sum(parameter.numel() for parameter in CifarResNet(depth=20).parameters())
    assert parameters == pytest.approx(0.272e6, rel=0.01)


@pytest.mark.parametrize("depth", [8, 14, 20])
def test_depth_counts_the_weighted_layers(depth: int) -> None:
    network = CifarResNet(depth=depth, width=4)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == depth


@pytest.mark.parametrize("depth", [2, 9, -4])
def test_an_impossible_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2 with n >= 1 .*, got {depth}"):
        CifarResNet(depth=depth)


def test_every_parameter_learns() -> None:
    network = CifarResNet(depth=8, width=4)
    network(torch.randn(2, *network.input_shape)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
