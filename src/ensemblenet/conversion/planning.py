"""Choose where to split and how wide the heads are, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from torch import fx

from ensemblenet.conversion.build import HeadDesign, design_head
from ensemblenet.conversion.split import Cut, SplitPoint, named_cut
from ensemblenet.conversion.trace import Trace
from ensemblenet.cost import Budget, Cost
from ensemblenet.errors import BudgetError, ConversionError
from ensemblenet.recipe import Conversion, HeadShape

__all__ = ["STEM", "Plan", "choose_plan", "is_eligible", "plan_at", "preferred"]

# The share of the base's MACs that the trunk keeps in the automatic plan, which is a stem's: heads that share little
# had the lowest errors, see docs/procedure.md.
STEM = 0.05
_NEAR = 0.05
# Heads narrower than this are bottlenecks rather than networks.
_LEAST_WIDTH = 0.1
_MULTIPLES = (8, 4, 2, 1)
# A trunk without multiply-adds, such as embeddings, is a table of inputs: K narrow copies of it would learn the same.
_LOOKUP_RATIO = 0.9
_BUDGET_USED = 0.9
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Plan:
    """A split point, and how wide heads may be there.

    Attributes:
        split: the split point.
        cost: what the whole model would cost; the least possible, if the plan does not fit.
        head: the shape of every head; None if no width fits the budget.
        keepers: if none fits, what keeps the width of its layers, in words; first what keeps most parameters.

    Example:
        >>> import torch, ensemblenet
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        >>> first, *_ = ensemblenet.plans(base, torch.randn(4, 8), num_heads=2, budget=1.0)
        >>> first.split.name, first.width, first.cost.parameters
        ('input', 0.484, 726)
    """

    split: SplitPoint
    cost: Cost
    head: HeadShape | None
    keepers: tuple[str, ...] = ()

    @property
    def width(self) -> float | None:
        """The share of its channels that a head keeps; None if no width fits."""
        return None if self.head is None else self.head.width

    @property
    def multiple(self) -> int:
        """What large channel counts are rounded to."""
        return HeadShape.multiple if self.head is None else self.head.multiple


def plan_at(design: HeadDesign, num_heads: int, limit: Cost, combining: Cost) -> Plan:
    """The widest heads at one split point that the limit allows.

    Channels are rounded to multiples of 8; where that would leave more than a tenth of the budget unused, to
    smaller ones, and where that is so again, attention heads and groups become narrower rather than fewer.

    Args:
        design: of the heads.
        num_heads: K.
        limit: the most that the model may cost.
        combining: what it costs to combine the heads' outputs.
    """

    def cost(shape: HeadShape) -> Cost:
        return design.cut.trunk_cost + num_heads * design.cost(shape) + combining

    def fits(cost: Cost) -> bool:
        return max(cost.shares_of(limit)) <= 1 + _ROUNDING

    best: Plan | None = None
    for blocks, multiple in product(design.blocks(), _MULTIPLES):
        width = _widest(lambda width, m=multiple, b=blocks: fits(cost(HeadShape(width, m, blocks=b))))
        if width is None:
            continue
        shape = HeadShape(width, multiple, design.pinned, blocks)
        total = cost(shape)
        plan = Plan(design.cut.point, total, shape)
        used = max(total.shares_of(limit))
        if best is None or used > max(best.cost.shares_of(limit)):
            best = plan
        if width == 1 or used >= _BUDGET_USED:
            break
    return best or Plan(design.cut.point, cost(HeadShape(0.0, 1)), None, tuple(design.keepers()))


def _widest(fits: Callable[[float], bool]) -> float | None:
    """The largest width that fits, to three decimals, by bisection: a cost never falls when the width grows."""
    if fits(1.0):
        return 1.0
    low, high = 0, 1000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle / 1000) else (low, middle)
    return low / 1000 if low and fits(low / 1000) else None


def choose_plan(
    trace: Trace,
    cuts: list[Cut],
    wanted: Conversion,
    base: Cost,
    combining: Cost,
    pinned: set[fx.Node],
    misfits: dict[str, Plan],
) -> tuple[HeadDesign, Plan]:
    """The split point that the user names, or the one that the automatic rule chooses.

    Args:
        trace: the traced base.
        cuts: its split points.
        wanted: what the user asks for.
        base: what the base costs.
        combining: what it costs to combine the heads' outputs.
        pinned: nodes that must keep their sizes.
        misfits: plans that do not fit, by split point; what does not fit with few pinned nodes does not with more, so
            they are not solved again. Those that are found are added.

    Raises:
        ConversionError: there is no such split point, or none at all.
        BudgetError: the budget cannot be met.
    """
    if not any(cut.has_parameters for cut in cuts):
        raise ConversionError("The base has no parameters that heads could have of their own.")
    limit = Budget.of(wanted.budget).limit(base)
    if wanted.split_at != "auto":
        cut = named_cut(cuts, wanted.split_at)
        if not cut.has_parameters:
            raise ConversionError(
                f"No parameters follow split point {wanted.split_at!r}, so all heads would be the same."
            )
        design = design_head(trace, cut, pinned)
        plan = plan_at(design, wanted.num_heads, limit, combining)
        if plan.width is None or plan.width < (wanted.min_width or 0.0):
            raise _no_fit(plan, wanted, base, f"at split point {wanted.split_at!r}")
        return design, plan
    able = {cut.point.name: cut for cut in cuts if cut.has_parameters}
    unshared: tuple[HeadDesign, Plan] | None = None  # heads that share nothing, if they come first
    for point in preferred([cut.point for cut in able.values()]):
        if unshared and _distance(point, STEM) > _distance(unshared[1].split, STEM):
            break
        if point.name in misfits:
            continue
        design = design_head(trace, able[point.name], pinned)
        plan = plan_at(design, wanted.num_heads, limit, combining)
        if not is_eligible(plan, wanted):
            misfits[point.name] = plan
        elif able[point.name].node is trace.input_nodes[0]:
            unshared = design, plan
        elif unshared is None or plan.width >= unshared[1].width * _least_ratio(point):  # type: ignore[operator]
            return design, plan
    if unshared:
        return unshared
    # the one that comes nearest: the widest heads, or where none fit, the least cost
    least = max(misfits.values(), key=lambda plan: (plan.width or 0.0, -max(plan.cost.shares_of(limit))))
    raise _no_fit(least, replace(wanted, min_width=_least_width(wanted)), base, "at any split point")


def _least_ratio(point: SplitPoint) -> float:
    """How wide heads must be, as a share of heads that share nothing, for a trunk to be shared rather than not."""
    return 1.0 if point.macs_share else _LOOKUP_RATIO


def preferred(points: Sequence[SplitPoint], share: float = STEM) -> list[SplitPoint]:
    """Split points, in the order in which they are tried.

    Those near a share of the MACs come first; of those that are near, the ends of large modules, however deep the
    network itself lies in others; of equals, the last, which shares most.

    Args:
        points: in the network's order.
        share: of the base's MACs, that the trunk should have.

    Example:
        >>> shares = {"a": 0.0, "b.c": 0.1, "d": 0.5}
        >>> points = [SplitPoint(name, (), (2, 8), 0.0, share) for name, share in shares.items()]
        >>> [point.name for point in preferred(points)], preferred(points, 0.5)[0].name
        (['a', 'b.c', 'd'], 'd')
    """

    from_the_end = points[::-1]
    depth = min((point.name.count(".") for point in points if point.name != "input"), default=0)

    def key(point: SplitPoint) -> tuple[int, int, float]:
        inside = 0 if point.name == "input" else point.name.count(".") - depth
        return _distance(point, share), inside, abs(point.macs_share - share)

    return sorted(from_the_end, key=key)


def _distance(point: SplitPoint, share: float) -> int:
    """How far a split point is from a share, in steps; points of one step count as equally near."""
    return int(abs(point.macs_share - share) / _NEAR)


def is_eligible(plan: Plan, wanted: Conversion) -> bool:
    """Whether a plan may be chosen for the user: its heads are wide enough, and have parameters of their own."""
    own_parameters = plan.split.parameters_share < 1
    return own_parameters and plan.width is not None and plan.width >= _least_width(wanted)


def _least_width(wanted: Conversion) -> float:
    return _LEAST_WIDTH if wanted.min_width is None else wanted.min_width


def _no_fit(plan: Plan, wanted: Conversion, base: Cost, where: str) -> BudgetError:
    heads, allowed = wanted.num_heads, f"a budget of {Budget.of(wanted.budget)}"
    if plan.width is not None:
        return BudgetError(
            f"{heads} heads that keep {wanted.min_width:g} of their channels do not fit {allowed} {where}: they could "
            f"keep {plan.width:g} (at {plan.split.name!r}); use fewer heads, a larger budget or a smaller min_width."
        )
    least = Budget.of(wanted.budget).of_limited(plan.cost.shares_of(base), ".3f")
    causes = f" What keeps its width there: {', '.join(plan.keepers[:3])}." if plan.keepers else ""
    return BudgetError(
        f"{heads} heads do not fit {allowed} {where}. The least possible is {least} (at {plan.split.name!r}); use "
        f"fewer heads or a larger budget.{causes}"
    )
