"""Whether a conversion trains as its base does: the same outputs and the same gradients, at full width."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ensemblenet


class Net(nn.Module):
    """Three linear layers and a forward pass of a test's own: `run(self, x)`."""

    def __init__(self, run: Callable[[Any, Any], Tensor], **more: Any) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        self.run = run
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def assert_trains_alike(base: nn.Module, x: Tensor, split_at: str = "input") -> ensemblenet.EnsembleNet:
    """Compare outputs in both modes, and all gradients."""
    model = ensemblenet.convert(base, x, num_heads=1, budget=5.0, split_at=split_at, init="inherit")
    twin = copy.deepcopy(base)
    for mode in (False, True):
        torch.manual_seed(1)
        expected = twin.train(mode)(x)
        torch.manual_seed(1)
        got = model.train(mode)(x)
        got = got[0] if mode else got
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    expected.float().square().sum().backward()
    got.float().square().sum().backward()
    gradients = {name.removeprefix("trunk.").removeprefix("heads.0."): p.grad for name, p in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        gradient = gradients.get(name)
        assert (gradient is None) == (parameter.grad is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-2, atol=1e-3 * gradient.abs().max().item())
    return model
