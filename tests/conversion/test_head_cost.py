"""What a plan says that a model costs is what the built model is measured to cost."""

import pytest
import timm
import torch
from networks import ODD
from torch import nn

from ensemblenet import EnsembleNet, convert, measure_cost
from ensemblenet.conversion.build import design_head
from ensemblenet.conversion.split import find_cuts
from ensemblenet.conversion.trace import trace
from ensemblenet.recipe import HeadShape

# convolutions, groups, attention over channels and tokens, normaliser-free: networks whose plans are exact
TIMM = {"test_resnet": 64, "test_convnext": 64, "regnety_002": 64, "test_vit": 160, "test_nfnet": 96}


def check(model: EnsembleNet, x: torch.Tensor) -> None:
    planned, measured = model.cost, measure_cost(model, x)
    assert planned is not None
    assert (planned.parameters, planned.activations) == (measured.parameters, measured.activations)
    assert planned.macs == pytest.approx(measured.macs)
    assert planned.time == pytest.approx(measured.time)


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("budget", [0.8, 10.0])
def test_plans_of_timm_networks(name: str, budget: float) -> None:
    base, x = timm.create_model(name), torch.randn(2, 3, TIMM[name], TIMM[name])
    model = convert(base, x, 2, budget)
    assert model.recipe is not None
    assert (model.recipe.head.width == model.recipe.head.depth == 1) == (budget > 1)
    check(model, x)


@pytest.mark.parametrize("name", [name for name in ODD if name != "recurrent"])
@pytest.mark.parametrize("budget", [0.8, 10.0])
def test_plans_of_odd_graphs(name: str, budget: float) -> None:
    make, shape = ODD[name]
    x = torch.randn(2, *shape)
    check(convert(make(), x, 3, budget, combine="probabilities"), x)


def test_groups_that_become_fewer_have_fewer_statistics() -> None:
    make, shape = ODD["volume"]
    x = torch.randn(2, *shape)
    check(convert(make(), x, 2, 0.9), x)


def test_the_first_heads_of_a_model_cost_what_they_are_measured_to() -> None:
    base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(2, 8)
    model = convert(base, x, 3, 2.0)
    for k in (1, 2):
        check(model.first(k), x)


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_the_inside_of_a_recurrent_layer_is_estimated(layer: type[nn.RNNBase]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.steps, self.last = nn.Linear(8, 32), layer(32, 64, batch_first=True), nn.Linear(64, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.steps(self.first(x))[0][:, -1])

    x = torch.randn(2, 6, 8)
    model = convert(Net(), x, 2, split_at="input")
    assert model.cost is not None
    measured = measure_cost(model, x)
    assert model.cost.activations == pytest.approx(measured.activations, rel=0.02)
    assert model.cost.time == pytest.approx(measured.time, rel=0.02)


def test_a_cost_never_falls_when_the_width_grows() -> None:
    traced = trace(timm.create_model("test_resnet"), torch.randn(2, 3, 64, 64))
    design = design_head(traced, find_cuts(traced)[1], set())
    costs = [design.cost(HeadShape(width / 20, 1)) for width in range(1, 21)]
    for name in ("parameters", "macs", "activations", "time"):
        values = [getattr(cost, name) for cost in costs]
        assert values == sorted(values)
        assert values[0] < values[-1]
