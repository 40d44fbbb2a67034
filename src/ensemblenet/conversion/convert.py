"""Convert a network into a multi-headed one: a shared trunk with K narrower heads."""

from __future__ import annotations

import warnings
from typing import get_args

import torch
from torch import Tensor, fx, nn

from ensemblenet.conversion.build import HeadDesign, Sizing, build_head, build_trunk, check_head, design_head
from ensemblenet.conversion.capacity import Capacity
from ensemblenet.conversion.initialise import Init, Initialiser
from ensemblenet.conversion.planning import Budget, Plan, check_budget, choose_plan, plan_at
from ensemblenet.conversion.split import SplitPoint, cut_graph, find_cuts, named_cut
from ensemblenet.conversion.trace import BY_HAND, Trace, keeping_state, trace
from ensemblenet.cost import Cost, count_parameters
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ConversionError
from ensemblenet.functional import Combine, Task
from ensemblenet.recipe import Recipe, find_source

__all__ = ["convert", "plans", "rebuild", "split_points"]

_MOST_REPAIRS = 25


@torch.inference_mode(False)  # tensors of inference mode cannot be traced
def convert(
    base: nn.Module,
    example_inputs: Tensor | tuple[Tensor],
    num_heads: int = 2,
    budget: float | Budget = 1.0,
    split_at: str = "auto",
    seed: int = 0,
    *,
    init: Init = "fresh",
    combine: Combine = "logits",
    task: Task = "multiclass",
    min_width: float | None = None,
    capacity: Capacity | None = None,
) -> EnsembleNet:
    """Convert a network into a shared trunk with K narrower heads, within a budget.

    Args:
        base: a network of one tensor in and one tensor out; it is not changed.
        example_inputs: an input for it, shape (N, *), as a tensor or a tuple of one; N of at least 2 lets
            layers that need several examples train.
        num_heads: K, at least 1.
        budget: the most that the model may cost, as a share of the base's parameters and of its MACs, or a
            `Budget` for each.
        split_at: the name of a split point, see [`ensemblenet.split_points`][], or "auto".
        seed: the source of all chance; the same seed gives the same model.
        init: "fresh" draws all weights anew, at the scale of the base's own, so give it a base that has not been
            trained; "inherit" keeps the base's weights in the trunk and gives each head its own choice of the base's
            channels.
        combine: how evaluation turns K outputs into one, see [`ensemblenet.functional.combine_heads`][].
        task: what the outputs mean; only `combine="probabilities"` depends on it.
        min_width: the least share of its channels that a head may keep, so that no more of the base is given up than
            you think it can spare; "auto" passes over split points where heads would be narrower. None is 0.1 for
            "auto", and no limit at a split point that you name.
        capacity: what [`ensemblenet.spare_capacity`][] found of the trained base; a warning is given where it shows
            that the conversion is likely to lose.

    Returns:
        The model, on the base's device and in the base's mode.

    Raises:
        ConversionError: the base or the inputs cannot be used; the message says why, and where in the user's code.
        BudgetError: no width fits the budget; the message gives the least possible cost.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> model = convert(base, torch.randn(4, 8), num_heads=3, budget=1.0)
        >>> model.train()(torch.randn(4, 8)).shape
        torch.Size([3, 4, 3])
    """
    x = _check_inputs(base, example_inputs)
    _check_choices(num_heads, init, min_width)
    shares = check_budget(budget)
    traced = trace(base, x)
    cuts = find_cuts(traced)
    base_cost = _base_cost(base, traced)
    frozen: set[fx.Node] = set()
    misfits: dict[str, Plan] = {}
    while True:
        design, plan = choose_plan(traced, cuts, num_heads, shares, split_at, min_width, base_cost, frozen, misfits)
        assert plan.width is not None
        sizing = Sizing(plan.width, plan.multiple)
        if not _repair(design, sizing, frozen):
            break
    recipe = Recipe(
        base=find_source(base, tuple(x.shape[1:])),
        input_shape=tuple(x.shape[1:]),
        input_dtype=str(x.dtype).removeprefix("torch."),
        num_heads=num_heads,
        split_at=plan.split.name,
        width=sizing.width,
        multiple=sizing.multiple,
        frozen=tuple(sorted(node.name for node in frozen)),
        init=init,
        seed=seed,
        combine=combine,
        task=task,
    )
    model = _assemble(design, sizing, recipe, base_cost)
    _check_training_step(model, x)
    if init == "fresh" and _looks_trained(base):
        note = "The base has been trained, and fresh heads would begin at the scale of its trained weights; "
        traced.notes.append(note + 'pass init="inherit", or an untrained instance of the base.')
    if capacity is not None and not capacity.is_spare:
        traced.notes.append(str(capacity))
    for note in traced.notes:
        warnings.warn(note, stacklevel=2)
    return model.train(base.training)


@torch.inference_mode(False)
def rebuild(base: nn.Module, recipe: Recipe) -> EnsembleNet:
    """Make the model of a recipe again, with the weights that it began with.

    Raises:
        ConversionError: the base is not the one that the recipe was made from.
    """
    dtype = getattr(torch, recipe.input_dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((2, *recipe.input_shape), generator=generator).to(dtype)
    traced = trace(base, x)
    cut = named_cut(find_cuts(traced), recipe.split_at)
    frozen = {node for node in traced.graph.nodes if node.name in recipe.frozen}
    design = design_head(traced, cut, frozen)
    return _assemble(design, Sizing(recipe.width, recipe.multiple), recipe, _base_cost(base, traced))


@torch.inference_mode(False)
def split_points(base: nn.Module, example_inputs: Tensor | tuple[Tensor]) -> list[SplitPoint]:
    """All places where a network can be split, with the trunk's share of the cost.

    They come in order, from "input", which shares nothing.

    Raises:
        ConversionError: the base or the inputs cannot be used.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> [point.name for point in split_points(base, torch.randn(4, 8))]
        ['input', '0', '1']
    """
    return [cut.point for cut in find_cuts(trace(base, _check_inputs(base, example_inputs)))]


@torch.inference_mode(False)
def plans(
    base: nn.Module, example_inputs: Tensor | tuple[Tensor], num_heads: int = 2, budget: float | Budget = 1.0
) -> list[Plan]:
    """For every split point, the widest heads that a budget allows.

    Raises:
        ConversionError: the base, the inputs or the budget cannot be used.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> [(plan.split.name, plan.width is not None) for plan in plans(base, torch.randn(4, 8), budget=1.0)]
        [('input', True), ('0', True), ('1', True), ('2', False), ('3', False)]
    """
    traced = trace(base, _check_inputs(base, example_inputs))
    limit = check_budget(budget).limit(_base_cost(base, traced))
    return [plan_at(design_head(traced, cut, set()), num_heads, limit) for cut in find_cuts(traced)]


def _check_inputs(base: nn.Module, example_inputs: Tensor | tuple[Tensor]) -> Tensor:
    """The one input tensor, after checking that it and the base can be used."""
    if not isinstance(base, nn.Module):
        raise ConversionError(f"base must be an nn.Module, got {type(base).__name__}.")
    if isinstance(base, torch.jit.ScriptModule):
        raise ConversionError("base must be an ordinary nn.Module, got a scripted one; pass the module it came from.")
    inputs = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        kinds = ", ".join(type(value).__name__ for value in inputs)
        raise ConversionError(f"example_inputs must be one tensor, or a tuple of one, got ({kinds}).")
    (x,) = inputs
    if x.ndim < 2 or len(x) == 0:
        raise ConversionError(f"example_inputs must have the shape (N, ...) with N > 0, got {tuple(x.shape)}.")
    devices = {tensor.device for tensor in (*base.parameters(), *base.buffers())}
    if devices and devices != {x.device}:
        names = ", ".join(sorted(map(str, devices)))
        raise ConversionError(f"example_inputs are on {x.device} and the base is on {names}; move them to one device.")
    return x.detach()


def _check_choices(num_heads: int, init: str, min_width: float | None) -> None:
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ConversionError(f"num_heads must be an integer of at least 1, got {num_heads!r}.")
    if init not in get_args(Init):
        raise ConversionError(f"init must be one of {get_args(Init)}, got {init!r}.")
    if min_width is not None and not (isinstance(min_width, int | float) and 0 <= min_width <= 1):
        raise ConversionError(f"min_width must be a share of the base's channels, 0 to 1, got {min_width!r}.")


def _looks_trained(base: nn.Module) -> bool:
    """Whether batch normalisation has seen batches."""
    counters = [buffer for name, buffer in base.named_buffers() if name.endswith("num_batches_tracked")]
    return any(counter.item() > 0 for counter in counters)


def _base_cost(base: nn.Module, traced: Trace) -> Cost:
    return Cost(count_parameters(base), sum(traced.macs.values()))


def _repair(design: HeadDesign, sizing: Sizing, frozen: set[fx.Node]) -> bool:
    """Try one head; where it fails, freeze the sizes there and report that a new plan is needed."""
    initialiser = Initialiser("inherit", torch.Generator().manual_seed(0))
    head, copies = build_head(design, sizing, initialiser)
    failure = check_head(design, sizing, head, copies, _features(design))
    if failure is None:
        return False
    node, message = failure
    if node in frozen or len(frozen) >= _MOST_REPAIRS:
        raise ConversionError(f"A head of width {sizing.width:g} fails in {message}. {BY_HAND}")
    frozen.add(node)
    return True


def _features(design: HeadDesign) -> Tensor:
    """What the base computes at the split point for the example inputs."""
    cut, traced = design.cut, design.trace
    graph, _ = cut_graph(traced, cut.trunk, traced.placeholder, cut.node, lambda node: False)
    with torch.no_grad():
        return fx.GraphModule(traced.module, graph).eval()(traced.input)


def _assemble(design: HeadDesign, sizing: Sizing, recipe: Recipe, base_cost: Cost) -> EnsembleNet:
    """Build the trunk and the heads."""
    generator = torch.Generator().manual_seed(recipe.seed)
    heads = [build_head(design, sizing, Initialiser(recipe.init, generator))[0] for _ in range(recipe.num_heads)]
    trunk = build_trunk(design.trace, design.cut, Initialiser(recipe.init, generator))
    return EnsembleNet(
        trunk,
        heads,
        recipe.combine,
        task=recipe.task,
        recipe=recipe,
        trunk_cost=design.cut.trunk_cost,
        head_cost=design.cost(sizing),
        base_cost=base_cost,
    )


def _check_training_step(model: EnsembleNet, x: Tensor) -> None:
    """Run one forward and backward pass in training mode; the model is left as it was."""
    with torch.enable_grad(), keeping_state(model, x):
        outputs = model.train()(x)
        if not torch.isfinite(outputs).all():
            raise ConversionError("The converted model's outputs are not finite on the example inputs.")
        outputs.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
