"""Choose where to split and how wide the heads are, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from torch import fx

from ensemblenet.conversion.build import HeadDesign, Sizing, design_head
from ensemblenet.conversion.split import Cut, SplitPoint, named_cut
from ensemblenet.conversion.trace import Trace
from ensemblenet.cost import Cost
from ensemblenet.errors import BudgetError, ConversionError

__all__ = ["Budget", "Plan", "check_budget", "choose_plan", "plan_at", "preference"]

# The share of the base's MACs that the trunk keeps in the automatic plan, which is a stem's: heads that share little
# had the lowest errors, see docs/procedure.md.
_TRUNK_SHARE = 0.05
_NEAR = 0.05
# Heads narrower than this are bottlenecks rather than networks.
_LEAST_WIDTH = 0.1
_MULTIPLES = (8, 4, 2, 1)
_BUDGET_USED = 0.9


@dataclass(frozen=True)
class Budget:
    """The most that a multi-headed model may cost, as shares of its base.

    Attributes:
        parameters: share of the base's parameters.
        macs: share of the base's MACs.
    """

    parameters: float = 1.0
    macs: float = 1.0

    def limit(self, base: Cost) -> Cost:
        """The most that may be spent."""
        return Cost(math.floor(self.parameters * base.parameters), self.macs * base.macs)


@dataclass(frozen=True)
class Plan:
    """A split point, and how wide heads may be there.

    Attributes:
        split: the split point.
        cost: what the whole model would cost; the least possible, if the plan does not fit.
        width: the share of channels that a head keeps; None if no width fits the budget.
        multiple: what large channel counts are rounded to.
    """

    split: SplitPoint
    cost: Cost
    width: float | None
    multiple: int = 8


def check_budget(budget: float | Budget) -> Budget:
    """A budget for parameters and MACs, from what the user gave.

    Raises:
        BudgetError: it is not a positive number.
    """
    shares = (budget.parameters, budget.macs) if isinstance(budget, Budget) else (budget, budget)
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share < math.inf:
            raise BudgetError(
                f"budget must be a positive number (a share of the base's cost) or "
                f"ensemblenet.Budget(parameters=, macs=), got {share!r}."
            )
    return Budget(float(shares[0]), float(shares[1]))


def plan_at(design: HeadDesign, num_heads: int, limit: Cost) -> Plan:
    """The widest heads at one split point that the limit allows.

    Channels are rounded to multiples of 8; where that would leave more than a tenth of the budget unused, to
    smaller ones.
    """

    def cost(sizing: Sizing) -> Cost:
        return design.cut.trunk_cost + num_heads * design.cost(sizing)

    best: Plan | None = None
    for multiple in _MULTIPLES:
        width = _widest(lambda width, m=multiple: _fits(cost(Sizing(width, m)), limit))
        if width is None:
            continue
        total = cost(Sizing(width, multiple))
        plan = Plan(design.cut.point, total, width, multiple)
        used = max(total.share_of(limit))
        if best is None or used > max(best.cost.share_of(limit)):
            best = plan
        if width == 1 or used >= _BUDGET_USED:
            break
    return best or Plan(design.cut.point, cost(Sizing(0.0, 1)), None)


def _fits(cost: Cost, limit: Cost) -> bool:
    return cost.parameters <= limit.parameters and cost.macs <= limit.macs * (1 + 1e-9)


def _widest(fits: Callable[[float], bool]) -> float | None:
    """The largest width that fits, to three decimals; a cost never falls when the width grows."""
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
    num_heads: int,
    budget: Budget,
    split_at: str,
    min_width: float | None,
    base: Cost,
    frozen: set[fx.Node],
    misfits: dict[str, Plan],
) -> tuple[HeadDesign, Plan]:
    """The split point that the user names, or the one that the automatic rule chooses.

    Args:
        trace: the traced base.
        cuts: its split points.
        num_heads: K.
        budget: as shares.
        split_at: the user's choice, or "auto".
        min_width: the least share of its channels that a head keeps; None is 0.1 for "auto", and no limit elsewhere.
        base: what the base costs.
        frozen: nodes that must keep their sizes.
        misfits: plans that do not fit, by split point; what does not fit with few frozen nodes does not with more, so
            they are not solved again. Those that are found are added.

    Raises:
        ConversionError: there is no such split point, or none at all.
        BudgetError: the budget cannot be met.
    """
    if not any(cut.has_parameters for cut in cuts):
        raise ConversionError("The base has no parameters that heads could have of their own.")
    limit = budget.limit(base)
    if split_at != "auto":
        cut = named_cut(cuts, split_at)
        if not cut.has_parameters:
            raise ConversionError(f"No parameters follow split point {split_at!r}, so all heads would be the same.")
        design = design_head(trace, cut, frozen)
        plan = plan_at(design, num_heads, limit)
        if plan.width is None or plan.width < (min_width or 0.0):
            raise _no_fit(plan, num_heads, budget, min_width, base, f"at split point {split_at!r}")
        return design, plan
    min_width = _LEAST_WIDTH if min_width is None else min_width
    able = [cut for cut in reversed(cuts) if cut.has_parameters]  # of equals, the last shares most
    for cut in sorted(able, key=lambda cut: preference(cut.point, _TRUNK_SHARE)):
        if cut.point.name in misfits:
            continue
        design = design_head(trace, cut, frozen)
        plan = plan_at(design, num_heads, limit)
        if plan.width is not None and plan.width >= min_width:
            return design, plan
        misfits[cut.point.name] = plan
    # the one that comes nearest: the widest heads, or where none fit, the least cost
    least = max(misfits.values(), key=lambda plan: (plan.width or 0.0, -max(plan.cost.share_of(limit))))
    raise _no_fit(least, num_heads, budget, min_width, base, "at any split point")


def preference(point: SplitPoint, share: float) -> tuple[int, int, float]:
    """A key that sorts split points: near a share of the MACs first, and there the ends of the largest modules."""
    distance = abs(point.macs_share - share)
    return int(distance / _NEAR), point.name.count("."), distance


def _no_fit(plan: Plan, num_heads: int, budget: Budget, min_width: float | None, base: Cost, where: str) -> BudgetError:
    allowed = f"a budget of {budget.parameters:g} of the base's parameters and {budget.macs:g} of its MACs"
    if plan.width is not None:
        return BudgetError(
            f"{num_heads} heads that keep {min_width:g} of their channels do not fit {allowed} {where}: they could "
            f"keep {plan.width:g} (at {plan.split.name!r}); use fewer heads, a larger budget or a smaller min_width."
        )
    parameters, macs = plan.cost.share_of(base)
    return BudgetError(
        f"{num_heads} heads do not fit {allowed} {where}. The least possible is {parameters:.3f} of the parameters and "
        f"{macs:.3f} of the MACs (at {plan.split.name!r}); use fewer heads or a larger budget."
    )
