"""How long a conversion takes against its base, measured where they are."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ensemblenet.ensemble import EnsembleNet
from ensemblenet.inputs import Tree
from ensemblenet.timing import measure, step

__all__ = ["time_share"]


def time_share(base: nn.Module, model: EnsembleNet, x: Tree, *, training: bool = True) -> float:
    """The time of a step as a share of the base's, with heads one after another; neither network changes.

    Args:
        base: the network.
        model: its conversion, on the same device.
        x: inputs of the real shape, (N, *), or a tuple or a dictionary of tensors.
        training: whether a step is a forward and a backward pass, or else a prediction.

    Example:
        >>> from ensemblenet import convert
        >>> base, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(4, 8)
        >>> time_share(base, convert(base, x), x) > 0
        True
    """
    twins = {"base": copy.deepcopy(base).train(training), "model": copy.deepcopy(model).train(training)}
    with torch.inference_mode(False), torch.enable_grad():
        seconds = measure({name: step(twin, x) for name, twin in twins.items()}, repeats=5, at_least=1.0)
    return seconds["model"] / seconds["base"]
