"""The project's own networks, and networks by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ensemblenet.models import CifarResNet, MNIST1DNet
from ensemblenet.models.sources import ModelNameError, create, default_input_shape


def test_resnet20_has_the_parameters_of_its_layers():
    # He et al. 2015 report 0.27 million for depth 20.
    parameters = sum(parameter.numel() for parameter in CifarResNet(depth=20).parameters())
    assert parameters == pytest.approx(0.272e6, rel=0.01)


@pytest.mark.parametrize("depth", [8, 14, 20])
def test_depth_counts_the_weighted_layers(depth):
    network = CifarResNet(depth=depth, width=4)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == depth


@pytest.mark.parametrize("depth", [2, 9, -4])
def test_an_impossible_depth(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2 with n >= 1 .*, got {depth}"):
        CifarResNet(depth=depth)


def test_mnist1d_net_takes_signals_with_and_without_a_channel():
    network = MNIST1DNet(width=8).eval()
    x = torch.randn(3, 40)
    assert torch.equal(network(x), network(x.unsqueeze(1)))


@pytest.mark.parametrize("network", [MNIST1DNet(width=8), CifarResNet(depth=8, width=4)])
def test_every_parameter_learns(network):
    network(torch.randn(2, *network.input_shape)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_create_knows_timm_torchvision_and_callables():
    assert create("test_resnet", num_classes=7)(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert isinstance(create("ensemblenet.models:CifarResNet"), CifarResNet)
    torchvision = pytest.importorskip("torchvision")
    assert isinstance(create("torchvision:squeezenet1_1"), torchvision.models.SqueezeNet)


def test_default_input_shapes():
    assert default_input_shape(create("test_resnet")) == (3, 160, 160)
    assert default_input_shape(MNIST1DNet()) == (40,)
    assert default_input_shape(nn.ReLU()) is None


def test_an_unknown_name_suggests_near_ones():
    with pytest.raises(ModelNameError, match=r"Did you mean .*resnet18"):
        create("resnet18x")
