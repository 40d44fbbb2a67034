"""What heads begin with."""

import pytest
import torch
from torch import nn

from ensemblenet import convert
from ensemblenet.cost import Budget

X = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6)
    )


def test_every_head_inherits_channels_of_its_own() -> None:
    base = normalised()
    model = convert(base, X, num_heads=3, init="inherit", split_at="2")
    rows = [{tuple(row.tolist()) for row in head.get_submodule("5").weight.T} for head in model.heads]  # type: ignore[union-attr]
    of_base = {tuple(column.tolist()) for column in base[5].weight.T}  # type: ignore[union-attr]
    assert all(chosen < of_base for chosen in rows)
    assert len({frozenset(chosen) for chosen in rows}) == 3


@pytest.mark.filterwarnings("ignore:The base has been trained")
def test_fresh_parts_have_seen_no_data_and_inherited_ones_have() -> None:
    base = normalised()
    base.train()(X * 3 + 1)
    statistics = base[1].running_mean
    for split_at, part in (("input", "heads.0"), ("2", "trunk")):
        fresh = convert(base, X, split_at=split_at).get_submodule(f"{part}.1")
        assert not fresh.running_mean.any()
        assert fresh.num_batches_tracked == 0
        inherited = convert(base, X, split_at=split_at, init="inherit").get_submodule(f"{part}.1")
        assert set(inherited.running_mean.tolist()) <= set(statistics.tolist())


def test_small_layers_are_rounded_finely_so_that_the_budget_is_used() -> None:
    base = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 6))
    model = convert(base, X, num_heads=2, budget=Budget(1.0, 1.0), split_at="input")
    assert model.cost is not None
    assert model.base_cost is not None
    assert max(model.cost.share_of(model.base_cost)) >= 0.9
