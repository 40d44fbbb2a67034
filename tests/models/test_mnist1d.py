from __future__ import annotations

import torch

from ensemblenet.models import MNIST1DNet


def test_signals_with_and_without_a_channel() -> None:
    network = MNIST1DNet(width=8).eval()
    x = torch.randn(3, 40)
    assert torch.equal(network(x), network(x.unsqueeze(1)))


def test_every_parameter_learns() -> None:
    network = MNIST1DNet(width=8)
    network(torch.randn(2, *network.input_shape)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
