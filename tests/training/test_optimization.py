"""Optimizer and schedule."""

from __future__ import annotations

import pytest
from torch import nn

from ensemblenet.training.optimization import Optimization, build_optimizer, build_schedule


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
