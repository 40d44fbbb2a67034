"""Optimizer and schedule."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import ensemblenet
from ensemblenet.training.optimization import (
    Optimization,
    build_optimizer,
    build_schedule,
    check_optimizers,
    layer_depths,
)


def test_decay_spares_what_has_one_dimension() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    decayed, kept = build_optimizer(network, Optimization("sgd", weight_decay=0.1)).param_groups
    assert [parameter.ndim for parameter in decayed["params"]] == [2]
    assert {parameter.ndim for parameter in kept["params"]} == {1}
    [every] = build_optimizer(network, Optimization(weight_decay=0.1, decay_all=True)).param_groups
    assert len(every["params"]) == 4


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), settings := Optimization(lr=2.0, warmup=0.1))
    schedule = build_schedule(optimizer, 100, settings)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


@pytest.mark.parametrize("option", [{"lr": 0.0}, {"weight_decay": -1.0}, {"momentum": 1.0}, {"warmup": 1.5}])
def test_numbers_out_of_range(option: dict[str, float]) -> None:
    [name] = option
    with pytest.raises(ValueError, match=f"{name} must be .*, got"):
        Optimization(**option)


class Stages(nn.Module):
    """Written in another order than its input flows."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(16, 3)
        self.third = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.first = nn.Conv2d(3, 16, 3, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + self.second(x)  # one layer: the skip spans it
        return self.classify(self.third(x).relu().mean((2, 3)))


@pytest.mark.parametrize("converted", [False, True])
def test_layers_learn_more_slowly_the_nearer_they_are_to_the_input(converted: bool) -> None:
    base, x = Stages(), torch.randn(2, 3, 8, 8)
    depths = layer_depths(base, x)
    expected = {"first.": 0, "norm.": 0, "second.": 1, "third.": 2, "classify.": 3}
    assert depths == {
        name: next(depth for stage, depth in expected.items() if name.startswith(stage))
        for name, _ in base.named_parameters()
    }
    network: nn.Module = base
    if converted:
        network = ensemblenet.convert(base, x, 2, 4.0, "add", init="inherit", width=0.5, num_classes=5)
    settings = Optimization(lr=2.0, layer_decay=0.5, weight_decay=0.1)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in build_optimizer(network, settings, depths).param_groups
        for own in group["params"]
        for name, parameter in network.named_parameters()
        if own is parameter
    }
    rates = {"first.": 0.25, "norm.": 0.25, "second.": 0.5, "third.": 1.0, "classify.": 2.0, "projection.": 2.0}
    assert len(found) == len(list(network.parameters()))
    for name, (lr, decay) in found.items():
        own = re.sub(r"^(trunk|heads\.\d)\.", "", name)
        assert lr == next(rate for stage, rate in rates.items() if own.startswith(stage)), name
        assert decay == (0.1 if network.get_parameter(name).ndim > 1 else 0.0)


def test_a_frozen_trunk_is_in_no_group() -> None:
    base, x = Stages(), torch.randn(2, 3, 8, 8)
    model = ensemblenet.convert(base, x, 2, 4.0, "add", init="inherit", freeze="trunk")
    optimizer = build_optimizer(model, Optimization(layer_decay=0.5), layer_depths(base, x))
    held = [own for group in optimizer.param_groups for own in group["params"]]
    assert {id(own) for own in held} == {id(own) for own in model.heads.parameters()}
    check_optimizers(model, [optimizer])
