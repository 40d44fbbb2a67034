"""Everything that a conversion promises, checked on one network: for this project's tests and for users' own."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensemblenet.conversion.convert import convert_as
from ensemblenet.conversion.trace import Output, examples, pick
from ensemblenet.cost import measure_cost
from ensemblenet.ensemble import EnsembleNet, as_tuple
from ensemblenet.inputs import Inputs, Tree, call, num_examples, tensors_in
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
        depth: the share of the blocks that may be dropped which a head keeps.
        time_share: its estimated time on an accelerator as a share of the base's.

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
    depth: float
    time_share: float


def check_conversion(
    base: nn.Module, x: Tree, num_heads: int = 2, budget: float = 1.0, split_at: str = "auto", **options: Any
) -> ConversionReport:
    """Convert a network and check the result.

    Args:
        base: a network whose training step works on `x`.
        x: example inputs, N of at least 2: a tensor (N, *), or a tuple or a dictionary of tensors.
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
    wanted = Conversion(num_heads, budget, split_at, **{"seed": 0, **options})
    start = time.perf_counter()
    model = convert_as(wanted, base, x)
    seconds = time.perf_counter() - start
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items()), "the base changed"
    del before
    assert model.recipe is not None
    parameters, macs, time_share = _check_cost(model, base, x, budget)
    spread = _check_outputs(model, base, x)
    _check_round_trips(model, base, x)
    _check_gradients(model, x)
    check_full_width(base, x, model.recipe.split_at, wanted.output)
    head = model.recipe.head
    return ConversionReport(
        model.recipe.split_at, head.width, parameters, macs, spread, seconds, head.depth, time_share
    )


def _check_cost(model: EnsembleNet, base: nn.Module, x: Tree, budget: float) -> tuple[float, float, float]:
    x = next(iter(_other_sizes(x, 2)), x)  # as a conversion counts: what all examples share is paid by two of them
    measured, whole = measure_cost(model, x), measure_cost(base, x)
    assert model.cost is not None
    assert model.cost.parameters == measured.parameters, f"cost says {model.cost}, measured {measured}"
    assert abs(model.cost.macs - measured.macs) <= 1e-6 * measured.macs, f"cost says {model.cost}, measured {measured}"
    for name in ("activations", "time"):  # estimates: another layout in memory may need a copy more
        said, found = getattr(model.cost, name), getattr(measured, name)
        assert abs(said - found) <= 0.25 * found, f"cost says {said} of {name}, measured {found}"
    parameters, macs, _, time_share = measured.shares_of(whole)
    assert parameters <= budget, f"the parameters are {parameters:.4f} of the base's"
    assert macs <= budget * (1 + 1e-6), f"the MACs are {macs:.4f} of the base's"
    return parameters, macs, time_share


def _check_outputs(model: EnsembleNet, base: nn.Module, x: Tree) -> float | None:
    assert model.recipe is not None
    with torch.no_grad():
        expected = pick(call(base.eval(), x), model.recipe.output)
        heads = as_tuple(call(model.eval(), x, per_head=True))
        for base_output, outputs, combined in zip(expected, heads, as_tuple(call(model, x)), strict=True):
            shape = (model.num_heads, *base_output.shape)
            assert outputs.shape == shape, f"outputs have the shape {tuple(outputs.shape)}"
            assert torch.isfinite(outputs).all(), "outputs are not finite"
            mean = outputs.mean(0)
            assert torch.allclose(combined, mean, rtol=1e-4, atol=1e-6), "evaluation does not combine the heads"
        for other in _other_sizes(x, 1, 3):
            shapes = [output.shape for output in as_tuple(call(model, other))]
            wanted = [output.shape for output in pick(call(base, other), model.recipe.output)]
            assert shapes == wanted, f"for {num_examples(other)} examples, outputs have the shapes {shapes}"
    first, *others = (dict(head.named_parameters()) for head in model.heads)
    for k, other in enumerate(others, start=1):
        assert any(not torch.equal(first[name], other[name]) for name in first), f"heads 0 and {k} are the same"
    spread = expected[0].std().item()
    return heads[0].std().item() / spread if spread else None


def _other_sizes(x: Tree, *sizes: int) -> list[Tree]:
    """The inputs with other numbers of examples, if all tensors have a row for each."""
    inputs, tensors = Inputs.of(x), tensors_in(x)
    return [inputs.build(examples(inputs, tensors, size)) for size in sizes] if inputs.is_batched else []


def check_full_width(base: nn.Module, x: Tree, split_at: str, output: Output = None) -> None:
    """Check that a network split at full width is the network, for one example, three and those that are given.

    Its outputs must be within 1e-5 of the largest, and the gradients of all parameters within 1e-3: none where the
    base's have none.

    Raises:
        AssertionError: it is not.
        ConversionError: the network cannot be split there.

    Example:
        >>> check_full_width(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(4, 8), "0")
    """
    # a layer that both parts call counts twice, so the budget is not one
    wanted = Conversion(1, 2.0, split_at, seed=0, init="inherit", output=output)
    whole = convert_as(wanted, base, x).eval()
    for inputs in (x, *_other_sizes(x, 1, 3)):
        expected, got = pick(call(base.eval(), inputs), output), as_tuple(call(whole, inputs))
        if not all(one.isfinite().all() for one in expected):
            continue  # one example has no standard deviation, for instance
        for one, other in zip(expected, got, strict=True):
            error = (other - one).abs().max() / one.abs().max().clamp(min=1e-6)
            assert error <= 1e-5, f"the split at full width differs from the base by {error:.2g}"
        _check_same_gradients(base, whole, expected, got)


def _check_same_gradients(
    base: nn.Module, whole: EnsembleNet, expected: Sequence[Tensor], got: Sequence[Tensor]
) -> None:
    """Compare the gradients of the outputs' squares; a layer that both parts have gets the sum of theirs."""
    plain = getattr(base, "_orig_mod", base)
    names = dict(plain.named_parameters(remove_duplicate=False))
    found: dict[nn.Parameter, list[Tensor]] = {}
    for name, gradient in _gradients(got, whole).items():
        found.setdefault(names[name.removeprefix("trunk.").removeprefix("heads.0.")], []).append(gradient)
    expected_gradients = _gradients(expected, plain)
    for name, parameter in plain.named_parameters():
        one, others = expected_gradients.get(name), found.get(parameter)
        assert (one is None) == (others is None), f"{name} has a gradient in one of base and model alone"
        if one is not None and others is not None:
            error = (torch.stack(others).sum(0) - one).abs().max() / one.abs().max().clamp(min=1e-6)
            limit = max(1e-3, 16 * torch.finfo(one.dtype).eps)
            assert error <= limit, f"the gradient of {name} differs by {error:.2g}"


def _gradients(outputs: Sequence[Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The gradients of the outputs' squares, by the names of the parameters that have one."""
    loss = torch.stack([output.float().square().sum() for output in outputs]).sum()
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not loss.requires_grad or not trained:
        return {}
    # the graph is kept: some bases hold a part of it from one call in evaluation mode to the next
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, retain_graph=True)
    return {name: grad for name, grad in zip(trained, gradients, strict=True) if grad is not None}


def _check_round_trips(model: EnsembleNet, base: nn.Module, x: Tree) -> None:
    model.eval()
    with torch.no_grad():
        heads = as_tuple(call(model, x, per_head=True))

        def gives(other: nn.Module, expected: Iterable[Tensor], **options: Any) -> bool:
            return all(map(torch.equal, as_tuple(call(other, x, **options)), expected))

        for k in range(model.num_heads):
            assert gives(model.head(k), [outputs[k] for outputs in heads]), f"head({k}) differs"
        assert gives(model.first(1), [outputs[0] for outputs in heads]), "first(1) differs"
        twin = copy.deepcopy(model)
        assert gives(twin, heads, per_head=True), "the deep copy differs"
        for parameter in twin.parameters():
            parameter.zero_()
        twin.load_state_dict(model.state_dict())
        assert gives(twin, heads, per_head=True), "the state dict does not restore the model"
        del twin
        with tempfile.TemporaryDirectory() as folder:
            directory = save(model, Path(folder) / "model")
            assert model.recipe is not None
            again = load(directory, None if model.recipe.base else base)
            assert gives(again, heads, per_head=True), "the loaded model differs"


def _check_gradients(model: EnsembleNet, x: Tree) -> None:
    outputs = as_tuple(call(model.train(), x))
    torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    assert not missing, f"no gradient for {missing[:5]}"
