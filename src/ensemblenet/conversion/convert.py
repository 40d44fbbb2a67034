"""Convert a network into a multi-headed one: a shared trunk with K narrower heads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn

from ensemblenet.conversion.build import HeadDesign, build_head, build_trunk, check_head, design_head
from ensemblenet.conversion.capacity import Capacity
from ensemblenet.conversion.classifier import with_classes
from ensemblenet.conversion.family import family_of
from ensemblenet.conversion.importance import Inheritance, batches_of
from ensemblenet.conversion.initialise import Initialiser
from ensemblenet.conversion.measuring import time_share
from ensemblenet.conversion.planning import LATE, STEM, Plan, Planner, choose_num_heads
from ensemblenet.conversion.repair import repair
from ensemblenet.conversion.split import Cut, SplitPoint, find_cuts, named_cut
from ensemblenet.conversion.trace import BY_HAND, Output, Trace, differs, keeping_state, trace
from ensemblenet.conversion.trained import looks_trained
from ensemblenet.cost import Budget, Cost, count_parameters
from ensemblenet.ensemble import EnsembleNet, as_tuple, combining_cost
from ensemblenet.errors import BudgetError, ConversionError
from ensemblenet.functional import Combine, Task, no_logits
from ensemblenet.inputs import Inputs, Tree, call, tensors_in
from ensemblenet.models.finding import find_source
from ensemblenet.recipe import Conversion, Freeze, HeadShape, Importance, Init, Recipe, Shape

__all__ = ["convert", "convert_alone", "convert_as", "plans", "plans_as", "rebuild", "split_points"]

_RANKED = 4
_MOST_MEASURED = 5


def convert(
    base: nn.Module,
    example_inputs: Tree,
    num_heads: int | Literal["auto"] = 2,
    budget: float | Budget = 1.0,
    split_at: str = "auto",
    seed: int = 0,
    *,
    init: Init = "fresh",
    combine: Combine = "logits",
    task: Task = "multiclass",
    min_width: float | None = None,
    output: Output = None,
    capacity: Capacity | None = None,
    shape: Shape = "auto",
    width: float | None = None,
    depth: float | None = None,
    importance: Importance | None = None,
    calibration: Iterable[Any] | None = None,
    num_classes: int | None = None,
    freeze: Freeze | None = None,
) -> EnsembleNet:
    """Convert a network into a shared trunk with K narrower heads, within a budget.

    Args:
        base: a network; it is not changed.
        example_inputs: inputs for it: a tensor of shape (N, *), a tuple of the arguments by position or a dictionary
            of those by name; an argument may be a tuple or a dictionary of tensors itself. Tensors that share N with
            the first hold one row for each example. N of at least 2 lets layers that need several examples train.
        num_heads: K, at least 1; "auto" takes 4 or 3 where the base has blocks enough to drop for heads of full width
            that make it no slower, and else 2.
        budget: the most that the model may cost, as a share of the base's parameters and of its MACs, or a
            `Budget` for each of these, activations and time.
        split_at: the name of a split point, see [`ensemblenet.split_points`][], or "auto".
        seed: the source of all chance; the same seed gives the same model.
        init: "fresh" draws all weights anew, at the scale of the base's own, so give it a base that has not been
            trained; "inherit" keeps the base's weights in the trunk and gives each head its own choice of the base's
            channels, see `importance`. Frozen parameters (`requires_grad` is False) stay frozen: those that would be
            drawn anew or narrowed are refused.
        combine: how evaluation turns K outputs into one, see [`ensemblenet.functional.combine_heads`][].
        task: what the outputs mean. `combine="probabilities"` depends on it, and unless it is "regression" a warning
            says where the base ends in a softmax or a sigmoid.
        min_width: the least share of its channels that a head may keep, so that no more of the base is given up than
            you think it can spare; "auto" passes over split points where heads would be narrower. None is 0.1 for
            "auto", and no limit at a split point that you name.
        output: which tensor is to be learned where the base returns a dictionary, a tuple or an object of several: a
            key, an attribute or a position; a list of them makes heads give one stack for each. None takes the only
            one, or the one that is called "logits".
        capacity: what [`ensemblenet.spare_capacity`][] found of the trained base. Where it has none to spare, "auto"
            splits late, as heads of the last stage lose least, and a warning says that no gain is to be expected.
        shape: "narrow" heads keep all blocks of the base and lose width; "short" ones keep their width and lose blocks:
            like ones that follow each other, each with a matrix product or a convolution, and give a tensor of the
            shape that they take, such as the layers of a transformer or all but the first of a ResNet's stage. "auto"
            may do both: as few blocks as full width asks for, and one more where that would leave much of the budget
            unused; narrow where there are none to drop.
        width: the share of its channels that each head keeps, in place of the most that fits; above 1, fresh heads are
            wider than the base, where its sizes can grow.
        depth: the share of the blocks which heads may drop that each keeps, spread evenly over each run of like
            blocks, whose first always stays; in place of the most that fits.
        importance: what heads inherit: of each group of channels that belong together, those with the largest
            "magnitude" (L2 norm of their weights and normalisations' scales), the largest "scale" of normalisation, or
            those without which the loss changes most ("taylor", to first order; it needs `calibration`); by chance
            ("random"); or a function that is given a group, as a list of the names of its parameters with their values,
            (channels, *), and gives a score for each channel, (channels,). The most important go to every head, the
            others are dealt out in turns. Short heads take the values of blocks so too, where the blocks of a run
            differ in nothing else, by how much a block turns what flows through it if there is `calibration`, else by
            magnitude; with "loss", which for channels is "taylor", by the base's loss without the block. None means
            "taylor" with `calibration`, else "magnitude" with the same blocks in all heads.
        calibration: a loader of a few batches of inputs and targets, read once and kept in memory. By it inherited
            heads are repaired: batch normalisation takes its statistics anew, as a pass in training mode would, and
            linear layers and convolutions without it get the scale and bias that give each output its mean and standard
            deviation in the base.
        num_classes: of another task: each head gets a fresh classifier of so many outputs, and inherits the rest.
            Networks with `reset_classifier`, as timm's, are asked for it; of others the last linear layer or
            convolution that makes the output is replaced. "taylor" is then no default, as gradients would come through
            the fresh classifier. Costs are compared with the base of so many classes.
        freeze: "trunk" trains the heads alone, see
            [`EnsembleNet.freeze_trunk`][ensemblenet.EnsembleNet.freeze_trunk]; `split_at="auto"` then splits late.

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
    settings = (num_heads, budget, split_at, seed, init, combine, min_width, output, shape, width, depth, importance)
    wanted = Conversion(*settings, num_classes, freeze)
    return convert_as(wanted, base, example_inputs, task, capacity, calibration)


@torch.inference_mode(False)  # tensors of inference mode cannot be traced
def convert_as(
    wanted: Conversion,
    base: nn.Module,
    example_inputs: Tree,
    task: Task = "multiclass",
    capacity: Capacity | None = None,
    calibration: Iterable[Any] | None = None,
) -> EnsembleNet:
    """Do what [`ensemblenet.convert`][] does, with its options in one object.

    Args:
        wanted: the options; a seed of None takes the one that PyTorch was seeded with.
        base: as for `convert`.
        example_inputs: as for `convert`.
        task: as for `convert`.
        capacity: as for `convert`.
        calibration: as for `convert`.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> convert_as(Conversion(num_heads=3), base, torch.randn(4, 8)).num_heads
        3
    """
    _check_inputs(base, example_inputs)
    if calibration is not None and wanted.init != "inherit":
        raise ConversionError('calibration is for what heads inherit: pass init="inherit" too.')
    base, anew = _with_classes(wanted, base, example_inputs)
    trains = [parameter.requires_grad for parameter in base.parameters()]
    if trains and not any(trains):
        raise ConversionError("The base has nothing to train: unfreeze what heads shall learn, requires_grad_(True).")
    traced = trace(base, example_inputs, wanted.output)
    cuts = find_cuts(traced)
    base_cost = _base_cost(base, traced)
    splits_late = wanted.freeze is not None or not (capacity is None or capacity.is_spare)
    share = LATE if splits_late else STEM
    planner = _planner(traced, cuts, wanted, base_cost, task, share)
    design, recipe = _choose(planner, wanted, base, example_inputs, base_cost, task)
    if wanted.freeze is not None and design.cut.trunk_cost.parameters == 0:
        raise ConversionError(
            f'freeze="trunk" finds no parameters in the trunk, as the split is at {recipe.split_at!r}: name a later '
            "one by split_at=, of those that ensemblenet.split_points lists."
        )
    _check_split(design if not recipe.head.dropped else design_head(traced, named_cut(cuts, recipe.split_at), set()))
    batches = [] if calibration is None else batches_of(calibration, traced)
    inheritance = None
    if wanted.init == "inherit":
        inheritance = Inheritance(base, design, recipe, planner.runs, wanted.importance, batches, anew)
    lost: set[str] = set()
    model = _assemble(design, recipe, base_cost, lost, inheritance)
    _refuse_lost(lost, recipe)
    _check_training_step(model, example_inputs)
    if inheritance is not None and batches:
        repair(model, base, inheritance, batches)
    if inheritance is not None and inheritance.is_same and model.num_heads > 1:
        traced.notes.append(
            "All heads begin alike, and only chance in training could make them differ: pass importance= or "
            "calibration= for short heads that keep different blocks, or less width."
        )
    if wanted.init == "fresh" and looks_trained(base):
        traced.notes.append(
            'The base looks trained, and fresh heads know nothing of what it has learned: pass init="inherit", or an '
            "untrained instance of the base."
        )
    if capacity is not None and not capacity.is_spare:
        traced.notes.append(str(capacity))
    if task != "regression":
        traced.notes += _says_no_logits(traced, task)
    for note in traced.notes:
        warnings.warn(note, stacklevel=4)  # of whoever called `convert`
    return model.train(base.training)


def convert_alone(
    wanted: Conversion,
    base: nn.Module,
    example_inputs: Tree,
    task: Task = "multiclass",
    calibration: Sequence[Any] | None = None,
) -> tuple[Conversion, EnsembleNet]:
    """The budget of a conversion spent on one network, which is what heads must be better than.

    It has one block of each run and is as wide as fits; where the base has no blocks to drop, it is narrower.

    Args:
        wanted: what the heads are asked for.
        base: as for `convert`.
        example_inputs: as for `convert`.
        task: as for `convert`.
        calibration: batches, as for `convert`.

    Returns:
        What was asked of it, and the model of one head.

    Raises:
        ConversionError: the base cannot be converted, or not within the budget.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> alone, model = convert_alone(Conversion(budget=0.5), base, torch.randn(4, 8))
        >>> alone.shape, model.num_heads
        ('narrow', 1)
    """
    alone = replace(wanted, num_heads=1, split_at="input", shape="auto", width=None, depth=0.0)
    try:
        return alone, convert_as(alone, base, example_inputs, task, calibration=calibration)
    except ConversionError:  # no blocks to drop, or too little budget
        alone = replace(alone, shape="narrow", depth=None)
        return alone, convert_as(alone, base, example_inputs, task, calibration=calibration)


@torch.inference_mode(False)
def rebuild(base: nn.Module, recipe: Recipe, sizes: Mapping[str, tuple[int, ...]] | None = None) -> EnsembleNet:
    """Make the model of a recipe again, with the weights that it began with, if they were fresh.

    Inherited heads get channels by chance: what they began with depends on data that no recipe keeps.

    Args:
        base: a fresh instance of the base.
        recipe: of the model.
        sizes: of a head's parameters by name, where they are known: layers that have the base's own keep them, as an
            older version may not have been able to narrow them.

    Raises:
        ConversionError: the base is not the one that the recipe was made from.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> recipe = convert(base, torch.randn(4, 8), num_heads=3, split_at="input").recipe
        >>> rebuild(base, recipe).num_heads
        3
    """
    traced = trace(base, recipe.inputs.random(), recipe.output, recipe.inputs)
    cuts = find_cuts(traced)
    dropped = [(named_cut(cuts, begin), named_cut(cuts, end)) for begin, end in recipe.head.dropped]
    cut = named_cut(cuts, recipe.split_at).without(dropped)
    pinned = {node for node in traced.graph.nodes if node.name in recipe.head.pinned}
    grows = recipe.head.width > 1
    design = design_head(traced, cut, pinned, grows=grows)
    if sizes and (kept := _kept(design, recipe.head, sizes)):
        design = design_head(traced, cut, pinned | kept, grows=grows)
    return _assemble(design, recipe, _base_cost(base, traced))


def _kept(design: HeadDesign, shape: HeadShape, sizes: Mapping[str, tuple[int, ...]]) -> set[fx.Node]:
    """The nodes of a head whose parameters have the base's sizes, and would be narrowed now."""
    narrowed = {
        name for name, axes in design.parameters.items() if any(axis.value(shape.size) != axis.size for axis in axes)
    }
    return {
        node
        for node in design.cut.head
        for name, parameter in design.trace.parameters.get(node, {}).items()
        if name in narrowed and sizes.get(name) == tuple(parameter.shape)
    }


@torch.inference_mode(False)
def split_points(base: nn.Module, example_inputs: Tree, output: Output = None) -> list[SplitPoint]:
    """All places where a network can be split, with the trunk's share of the cost.

    They come in order, from "input", which shares nothing.

    Raises:
        ConversionError: the base or the inputs cannot be used.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> [point.name for point in split_points(base, torch.randn(4, 8))]
        ['input', '0', '1']
    """
    _check_inputs(base, example_inputs)
    return [cut.point for cut in find_cuts(trace(base, example_inputs, output))]


@torch.inference_mode(False)
def plans(
    base: nn.Module,
    example_inputs: Tree,
    num_heads: int = 2,
    budget: float | Budget = 1.0,
    output: Output = None,
    shape: Shape = "auto",
) -> list[Plan]:
    """For every split point, the heads that a budget allows.

    Args:
        base: a network.
        example_inputs: for it.
        num_heads: K.
        budget: as for [`ensemblenet.convert`][], as are the others.
        output: as there.
        shape: as there.

    Returns:
        The plans in the network's order.

    Raises:
        ConversionError: the base, the inputs or the budget cannot be used.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> [(plan.split.name, plan.width is not None) for plan in plans(base, torch.randn(4, 8), budget=1.0)]
        [('input', True), ('0', True), ('1', True), ('2', False), ('3', False)]
    """
    return plans_as(Conversion(num_heads, budget, output=output, shape=shape), base, example_inputs)


@torch.inference_mode(False)
def plans_as(wanted: Conversion, base: nn.Module, example_inputs: Tree) -> list[Plan]:
    """Do what [`ensemblenet.plans`][] does, with its options in one object.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> [plan.split.name for plan in plans_as(Conversion(), base, torch.randn(4, 8)) if plan.rank == 0]
        ['input']
    """
    _check_inputs(base, example_inputs)
    base, _ = _with_classes(wanted, base, example_inputs)
    traced = trace(base, example_inputs, wanted.output)
    cuts = find_cuts(traced)
    planner = _planner(traced, cuts, wanted, _base_cost(base, traced))
    found = {cut.point.name: planner.at(cut)[1] for cut in cuts}
    for rank in range(_RANKED):
        try:
            best = planner.choose()[1]
        except ConversionError:  # there are no more
            break
        planner.pass_over(best)
        found[best.split.name] = replace(best, rank=rank)
    for note in _says_no_logits(traced):
        warnings.warn(note, stacklevel=5)  # of whoever called `plans`
    return list(found.values())


def _check_inputs(base: nn.Module, example_inputs: Tree) -> None:
    """Refuse a base or inputs that cannot be used."""
    if not isinstance(base, nn.Module):
        raise ConversionError(f"base must be an nn.Module, got {type(base).__name__}.")
    if isinstance(base, torch.jit.ScriptModule):
        raise ConversionError("base must be an ordinary nn.Module, got a scripted one; pass the module it came from.")
    Inputs.of(example_inputs)  # refuses what is no tensor
    there = {tensor.device for tensor in tensors_in(example_inputs)}
    devices = {tensor.device for tensor in (*base.parameters(), *base.buffers())}
    if any(device.type == "meta" for device in devices):
        raise ConversionError(
            'The base is on the device "meta" and has no values: base.to_empty(device="cpu") makes room for them; then '
            "initialise or load them."
        )
    if devices and devices != there:
        names, others = (", ".join(sorted(map(str, found))) for found in (devices, there))
        raise ConversionError(f"example_inputs are on {others} and the base is on {names}; move them to one device.")


def _with_classes(wanted: Conversion, base: nn.Module, example_inputs: Tree) -> tuple[nn.Module, set[str]]:
    """The base with the classes that are wanted, and which of its parameters are new."""
    if wanted.num_classes is None:
        return base, set()
    return with_classes(base, example_inputs, wanted.num_classes, wanted.output, wanted.seed or 0)


def _says_no_logits(traced: Trace, task: Task = "multiclass") -> list[str]:
    with torch.enable_grad(), keeping_state(traced.module, traced.tensors[0]):
        outputs = as_tuple(fx.GraphModule(traced.module.eval(), traced.graph)(*traced.arguments))
    return [said for each in outputs if (said := no_logits(each, task))][:1]


def _base_cost(base: nn.Module, traced: Trace) -> Cost:
    return replace(traced.cost(traced.graph.nodes), parameters=count_parameters(base))


def _output_shapes(traced: Trace) -> list[tuple[int, ...]]:
    return [traced.refs[node].shape for node in traced.outputs]


def _planner(
    traced: Trace,
    cuts: list[Cut],
    wanted: Conversion,
    base_cost: Cost,
    task: Task = "multiclass",
    share: float = STEM,
) -> Planner:
    def planner_of(num_heads: int) -> Planner:
        combining = combining_cost(_output_shapes(traced), num_heads, wanted.combine, task)
        return Planner(cuts, wanted, num_heads, base_cost, combining, share)

    return choose_num_heads(planner_of) if wanted.num_heads == "auto" else planner_of(wanted.num_heads)


def _repair(design: HeadDesign, plan: Plan, planner: Planner) -> bool:
    """Try one head; where it fails, pin the sizes there and report that a new plan is needed."""
    assert plan.head is not None
    shape = plan.head
    initialiser = Initialiser("inherit", torch.Generator().manual_seed(0))
    head, copies = build_head(design, shape, initialiser)
    failure = check_head(design, shape, head, copies)
    if failure is None:
        return False
    node, message = failure
    if not planner.pin(node):
        raise ConversionError(f"A head of width {shape.width:g} fails in {message}. {BY_HAND}")
    return True


def _check_split(design: HeadDesign) -> None:
    """Compare trunk and head at full width and depth with the base, at every size that was tried."""
    head, _ = build_head(design, HeadShape(1.0), Initialiser("inherit", torch.Generator().manual_seed(0)))
    head.eval()
    for values, trial in zip(design.given[1:], design.trace.trials, strict=True):
        with torch.no_grad():
            difference = differs(trial.expected, head(*values))
        if difference:
            raise ConversionError(f"The split at {design.cut.point.name!r} changes the base. {difference} {BY_HAND}")


def _assemble(
    design: HeadDesign,
    recipe: Recipe,
    base_cost: Cost,
    lost: set[str] | None = None,
    inheritance: Inheritance | None = None,
) -> EnsembleNet:
    """Build the trunk and the heads; `lost` takes up which frozen parameters do not keep the base's values."""
    family = family_of(design.trace, recipe, {node.name for node in design.cut.head})
    generator = torch.Generator().manual_seed(recipe.seed)
    of_trunk = Initialiser(recipe.init, generator)
    of_heads = [Initialiser(recipe.init, generator, inheritance, k) for k in range(recipe.num_heads)]
    initialisers = [of_trunk, *of_heads]
    heads = [build_head(design, recipe.head, initialiser)[0] for initialiser in of_heads]
    trunk = build_trunk(design.trace, design.cut, of_trunk)
    if lost is not None:
        lost.update(*(initialiser.lost for initialiser in initialisers))
    model = EnsembleNet(
        trunk,
        heads,
        recipe.combine,
        task=recipe.task,
        recipe=recipe,
        trunk_cost=design.cut.trunk_cost,
        head_cost=design.cost(recipe.head),
        base_cost=base_cost,
        output_shapes=_output_shapes(design.trace),
        family=family,
    )
    return model if recipe.freeze is None else model.freeze_trunk()


def _choose(
    planner: Planner, wanted: Conversion, base: nn.Module, example_inputs: Tree, base_cost: Cost, task: Task
) -> tuple[HeadDesign, Recipe]:
    """The first plan whose heads run and, where time is to be measured, take no longer than the budget allows."""
    budget = Budget.of(wanted.budget)
    tried: dict[str, float] = {}
    while True:
        design, plan = planner.choose()
        if _repair(design, plan, planner):
            continue
        recipe = _recipe(design, plan, planner.num_heads, wanted, base, task)
        if not budget.measured:
            return design, recipe
        # inherited, as fresh weights would be drawn in the trace's own layers
        timed = _assemble(design, replace(recipe, init="inherit"), base_cost)
        tried[plan.split.name] = time_share(base, timed, example_inputs)
        if tried[plan.split.name] <= (budget.time or 0.0):
            return design, recipe
        if wanted.split_at != "auto" or len(tried) == _MOST_MEASURED:
            raise _too_slow(tried, budget)
        planner.pass_over(plan)


def _recipe(design: HeadDesign, plan: Plan, num_heads: int, wanted: Conversion, base: nn.Module, task: Task) -> Recipe:
    assert plan.head is not None
    inputs = design.trace.inputs
    return Recipe(
        base=find_source(base, inputs.tensors[0].shape),
        inputs=inputs,
        output=tuple(wanted.output) if isinstance(wanted.output, list) else wanted.output,
        num_heads=num_heads,
        split_at=plan.split.name,
        head=plan.head,
        init=wanted.init,
        seed=torch.initial_seed() % 2**32 if wanted.seed is None else wanted.seed,
        combine=wanted.combine,
        task=task,
        num_classes=wanted.num_classes,
        freeze=wanted.freeze,
    )


def _too_slow(tried: Mapping[str, float], budget: Budget) -> BudgetError:
    found = ", ".join(f"{share:.2f} at {name!r}" for name, share in tried.items())
    return BudgetError(
        f"No plan that was measured takes at most {budget.time:g} of the base's time: {found}. Use fewer heads, more "
        "time, or a smaller share of the MACs."
    )


def _refuse_lost(lost: set[str], recipe: Recipe) -> None:
    """Refuse to freeze for good what is not the base's any more."""
    if not lost:
        return
    first, count = ", ".join(sorted(lost)[:3]), len(lost)
    names = f"{first} and {count - 3} more" if count > 3 else first
    if recipe.init == "fresh":
        raise ConversionError(
            f"The base has {count} frozen parameters (requires_grad is False), which would be drawn anew and never "
            f'trained: {names}. Pass init="inherit", or unfreeze them with requires_grad_(True).'
        )
    raise ConversionError(
        f"Heads of width {recipe.head.width:.2g} would keep a part of {count} frozen parameters (requires_grad is "
        f"False) and never train it: {names}. Split behind them (split_at), allow heads of full width (budget), or "
        "unfreeze them with requires_grad_(True)."
    )


def _check_training_step(model: EnsembleNet, example_inputs: Tree) -> None:
    """Run one forward and backward pass in training mode; the model is left as it was."""
    with torch.enable_grad(), keeping_state(model, tensors_in(example_inputs)[0]):
        outputs = tensors_in(call(model.train(), example_inputs))
        if not all(torch.isfinite(output).all() for output in outputs):
            raise ConversionError("The converted model's outputs are not finite on the example inputs.")
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
    model.zero_grad(set_to_none=True)
