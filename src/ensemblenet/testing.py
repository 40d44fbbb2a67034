"""Everything that a conversion promises, checked on one network: for this project's tests and for users' own."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensemblenet.conversion.convert import convert, convert_as
from ensemblenet.cost import Cost, count_parameters, measure_cost
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.recipe import Conversion
from ensemblenet.storage.checkpoint import load, save

__all__ = ["ConversionReport", "check_conversion", "check_full_width"]


@dataclass(frozen=True)
class ConversionReport:
    """What [`ensemblenet.testing.check_conversion`][] found.

    Attributes:
        split_at: the split point.
        width: the share of channels that a head keeps.
        parameters_share: the model's parameters as a share of the base's.
        macs_share: its MACs as a share of the base's.
        spread: the standard deviation of a head's first outputs, as a share of the base's; None where the base
            begins with outputs of zero.
        seconds: how long `convert` took.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> report = check_conversion(base, torch.randn(4, 8))
        >>> report.split_at, max(report.parameters_share, report.macs_share) <= 1
        ('input', True)
    """

    split_at: str
    width: float
    parameters_share: float
    macs_share: float
    spread: float | None
    seconds: float


def check_conversion(
    base: nn.Module, x: Tensor, num_heads: int = 2, budget: float = 1.0, split_at: str = "auto", **options: Any
) -> ConversionReport:
    """Convert a network and check the result.

    Args:
        base: a network whose training step works on `x`.
        x: example inputs, shape (N, *), N of at least 2.
        num_heads: K.
        budget: the share of the base's cost.
        split_at: a split point's name, or "auto".
        options: others of [`ensemblenet.recipe.Conversion`][].

    Raises:
        AssertionError: a promise does not hold.
        ConversionError: the network cannot be converted.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> check_conversion(base, torch.randn(4, 8), num_heads=3).width < 1
        True
    """
    base.eval()
    before = copy.deepcopy(base.state_dict())
    start = time.perf_counter()
    model = convert_as(Conversion(num_heads, budget, split_at, **{"seed": 0, **options}), base, x)
    seconds = time.perf_counter() - start
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items()), "the base changed"
    del before
    shares = _check_cost(model, base, x, budget)
    spread = _check_outputs(model, base, x)
    _check_round_trips(model, base, x)
    _check_gradients(model, x)
    assert model.recipe is not None
    return ConversionReport(model.recipe.split_at, model.recipe.head.width, *shares, spread, seconds)


def _check_cost(model: EnsembleNet, base: nn.Module, x: Tensor, budget: float) -> tuple[float, float]:
    base_cost = Cost(count_parameters(base), measure_cost(base, x).macs)
    measured = measure_cost(model, x)
    assert model.cost is not None
    assert model.cost.parameters == measured.parameters, f"cost says {model.cost}, measured {measured}"
    assert abs(model.cost.macs - measured.macs) <= 1e-6 * measured.macs, f"cost says {model.cost}, measured {measured}"
    parameters, macs = measured.share_of(base_cost)
    assert parameters <= budget, f"the parameters are {parameters:.4f} of the base's"
    assert macs <= budget * (1 + 1e-6), f"the MACs are {macs:.4f} of the base's"
    return parameters, macs


def _check_outputs(model: EnsembleNet, base: nn.Module, x: Tensor) -> float | None:
    with torch.no_grad():
        expected = base.eval()(x)
        heads = model.eval()(x, per_head=True)
        assert heads.shape == (model.num_heads, *expected.shape), f"outputs have the shape {tuple(heads.shape)}"
        assert torch.isfinite(heads).all(), "outputs are not finite"
        assert torch.allclose(model(x), heads.mean(0), rtol=1e-4, atol=1e-6), "evaluation does not combine the heads"
    first, *others = (dict(head.named_parameters()) for head in model.heads)
    for k, other in enumerate(others, start=1):
        assert any(not torch.equal(first[name], other[name]) for name in first), f"heads 0 and {k} are the same"
    spread = expected.std().item()
    return heads.std().item() / spread if spread else None


def check_full_width(base: nn.Module, x: Tensor, split_at: str) -> None:
    """Check that a network split at full width is the network: within 1e-5 of its largest output.

    Raises:
        AssertionError: it is not.
        ConversionError: the network cannot be split there.

    Example:
        >>> check_full_width(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(4, 8), "0")
    """
    # a layer that both parts call counts twice, so the budget is not one
    whole = convert(base, x, num_heads=1, budget=2.0, split_at=split_at, init="inherit").eval()
    with torch.no_grad():
        expected, got = base.eval()(x), whole(x)
    error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert error <= 1e-5, f"the split at full width differs from the base by {error:.2g}"


def _check_round_trips(model: EnsembleNet, base: nn.Module, x: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        heads = model(x, per_head=True)
        for k in range(model.num_heads):
            assert torch.equal(model.head(k)(x), heads[k]), f"head({k}) differs"
        assert torch.equal(model.first(1)(x), heads[0]), "first(1) differs"
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x, per_head=True), heads), "the deep copy differs"
        for parameter in twin.parameters():
            parameter.zero_()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(x, per_head=True), heads), "the state dict does not restore the model"
        del twin
        with tempfile.TemporaryDirectory() as folder:
            directory = save(model, Path(folder) / "model")
            assert model.recipe is not None
            again = load(directory, None if model.recipe.base else base)
            assert torch.equal(again(x, per_head=True), heads), "the loaded model differs"


def _check_gradients(model: EnsembleNet, x: Tensor) -> None:
    model.train()(x).float().square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    assert not missing, f"no gradient for {missing[:5]}"
