"""Choose where to split and how wide the heads are, within a budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product

from torch import fx

from ensemblenet.conversion.blocks import Depth, Run, depths_behind, find_runs
from ensemblenet.conversion.build import HeadDesign, design_head
from ensemblenet.conversion.split import Cut, SplitPoint, named_cut
from ensemblenet.cost import ROOFLINE, Budget, Cost
from ensemblenet.errors import BudgetError, ConversionError
from ensemblenet.recipe import Conversion, HeadShape

__all__ = ["LATE", "STEM", "Plan", "Planner", "choose_num_heads", "is_eligible", "preferred"]

# The share of the base's MACs that the trunk keeps in the automatic plan, which is a stem's: heads that share little
# had the lowest errors, see docs/procedure.md.
STEM = 0.05
# The same where the base has no capacity to spare: heads of its last stage lose least.
LATE = 0.75
_NEAR = 0.05
# Heads narrower than this are bottlenecks rather than networks.
_LEAST_WIDTH = 0.1
# What kernels like best comes first: a tile of 32 channels or more that is filled in part takes as long as a whole one.
_MULTIPLES = (32, 16, 8, 4, 2, 1)
_MOST_WIDTH = 4.0
_MOST_GROWTH = 1.5  # of short heads, that nobody asked to be wider
# Short heads keep their width, or nearly; what they would leave of the budget lets them keep one block more.
_WELL_USED = 0.95
_LEAST_WIDTH_OF_SHORT = 0.75
# A model whose activations and time are no more than this, as shares of the base's, counts as fast as the base.
_FAST = 1.05
_MOST_STARTS = 0.5
_MANY_HEADS = (4, 3)
_MOST_REPAIRS = 25
_BLOCKS = ", which are alike, follow each other and give a tensor of the shape that they take."
_NARROW = 'pass shape="narrow".'
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
        rank: its place in the order in which `split_at="auto"` takes plans, 0 for the one that it takes; None for those
            behind the fourth.

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
    rank: int | None = None

    @property
    def width(self) -> float | None:
        """The share of its channels that a head keeps; None if no width fits."""
        return None if self.head is None else self.head.width

    @property
    def depth(self) -> float | None:
        """The share of the blocks that may be dropped which a head keeps; None if nothing fits the budget."""
        return None if self.head is None else self.head.depth

    @property
    def multiple(self) -> int:
        """What large channel counts are rounded to."""
        return HeadShape.multiple if self.head is None else self.head.multiple


def plan_at(
    design: HeadDesign,
    num_heads: int,
    limit: Cost,
    combining: Cost,
    depth: Depth,
    least: float,
    most: float,
) -> Plan:
    """The widest heads of a depth at one split point that the limit allows.

    Channels are rounded to multiples of 32 or 16 where no more than a twentieth of the budget is left unused, else to
    multiples of 8; where that would leave more than a tenth, to smaller ones, and where that is so again, attention
    heads and groups become narrower rather than fewer.

    Args:
        design: of the heads, which are of the depth already.
        num_heads: K.
        limit: the most that the model may cost.
        combining: what it costs to combine the heads' outputs.
        depth: of the heads.
        least: the least width that is tried.
        most: the largest.
    """
    whole = HeadShape(1.0, pinned=design.pinned, depth=depth.share, dropped=depth.names)

    def plan(shape: HeadShape) -> Plan:
        cost = design.cut.trunk_cost + num_heads * design.cost(shape) + combining
        return Plan(design.cut.point, cost, shape)

    def fits(plan: Plan) -> bool:
        return max(plan.cost.shares_of(limit)) <= 1 + _ROUNDING

    best: Plan | None = None
    for blocks, multiple in product(design.blocks(), _MULTIPLES):
        shape = replace(whole, multiple=multiple, blocks=blocks)
        found = _widest(lambda width, shape=shape: fits(plan(replace(shape, width=width))), least, most)
        if found is None:
            continue
        one = plan(replace(shape, width=found))
        used = max(one.cost.shares_of(limit))
        if best is None or used > max(best.cost.shares_of(limit)):
            best = one
        if found == most or used >= (_BUDGET_USED if multiple <= HeadShape.multiple else _WELL_USED):
            break
    lowest = plan(replace(whole, width=least, multiple=1))
    return best or replace(lowest, head=None, keepers=tuple(design.keepers()))


def _widest(fits: Callable[[float], bool], least: float, most: float) -> float | None:
    """The largest width that fits, to three decimals, by bisection: a cost never falls when the width grows."""
    if fits(most):
        return most
    low, high = round(1000 * least), round(1000 * most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle / 1000) else (low, middle)
    return low / 1000 if low and fits(low / 1000) else None


class Planner:
    """Chooses where to split a network, and how wide and how deep heads are there.

    Args:
        cuts: the network's split points.
        wanted: what the user asks for.
        num_heads: K.
        base: what the base costs.
        combining: what it costs to combine the heads' outputs.
        share: of the base's MACs, that the trunk should have where the split point is not named.

    Attributes:
        num_heads: K.
        runs: of blocks that heads may drop.
    """

    def __init__(
        self,
        cuts: list[Cut],
        wanted: Conversion,
        num_heads: int,
        base: Cost,
        combining: Cost,
        share: float = STEM,
    ) -> None:
        self.num_heads = num_heads
        self._pinned: set[fx.Node] = set()
        self._cuts = cuts
        self._wanted = wanted
        self._base = base
        self._combining = combining
        self._share = share
        budget = Budget.of(wanted.budget)
        self._limit = budget.limit(base)
        self._fast = _FAST * max(1.0, budget.macs or 1.0)
        self._must_shorten = wanted.shape == "short" or (wanted.depth is not None and wanted.depth < 1)
        self.runs = _runs_to_shorten(cuts, wanted)
        work = [numbers for _, numbers in cuts[0].flow.trace.work]
        self._is_small = not self.runs and ROOFLINE.starts(work) > _MOST_STARTS * ROOFLINE.time(work)
        self._found: dict[str, tuple[HeadDesign, Plan]] = {}  # by split point
        self._passed: set[str] = set()

    def pin(self, node: fx.Node) -> bool:
        """Have a node keep its sizes, because it failed with smaller ones; False if that was so already, or too often.

        What did not fit before does not fit then either, so only what did is planned anew.
        """
        if node in self._pinned or len(self._pinned) >= _MOST_REPAIRS:
            return False
        self._pinned.add(node)
        is_named = self._wanted.split_at != "auto"  # whose heads may be as narrow as they are
        self._found = {
            name: (design, plan)
            for name, (design, plan) in self._found.items()
            if plan.head is None or not (is_named or is_eligible(plan, self._wanted))
        }
        return True

    def pass_over(self, plan: Plan) -> None:
        """Have `choose` take another split point than this plan's."""
        self._passed.add(plan.split.name)

    def at(self, cut: Cut) -> tuple[HeadDesign, Plan]:
        """The plan at one split point."""
        name = cut.point.name
        if name not in self._found:
            self._found[name] = self._plan_at(cut)
        return self._found[name]

    def _plan_at(self, cut: Cut) -> tuple[HeadDesign, Plan]:
        depths = depths_behind(self.runs, cut)
        wanted = self._wanted
        if len(depths) == 1 and self._must_shorten:
            design, plan = self._plan(cut, depths[0])
            return design, replace(plan, head=None, keepers=())
        if wanted.depth is not None or len(depths) == 1:
            chosen = depths[round((wanted.depth or 0.0) * (len(depths) - 1))]
            # one network alone, short and as wide as fits, is what heads must be better than
            is_alone = self.num_heads == 1 and self._must_shorten and wanted.init == "fresh"
            return self._plan(cut, chosen, wanted.width, _MOST_WIDTH if is_alone else 1.0)
        width = wanted.width or 1.0
        num_fitting = bisect_left(depths, True, key=lambda depth: self._plan(cut, depth, width)[1].head is None)
        short = self._plan(cut, depths[max(num_fitting - 1, 0)], width)
        if wanted.width is not None or wanted.shape == "short" or num_fitting == len(depths):
            return short
        if num_fitting == 0:
            return self._plan(cut, depths[0])
        fast = [one for one in self._fuller(cut, depths, num_fitting) if self.is_fast(one[1])]
        if self.is_fast(short[1]):
            fast.insert(0, short)
        well_used = (one for one in fast if self._used(one[1]) >= _WELL_USED)
        return next(well_used, None) or max(fast, key=lambda one: self._used(one[1]), default=short)

    def _fuller(self, cut: Cut, depths: list[Depth], num_fitting: int) -> Iterator[tuple[HeadDesign, Plan]]:
        """Short heads that use what full width leaves of the budget, and those that give up blocks for more width."""
        deeper = self._plan(cut, depths[num_fitting])
        if (deeper[1].width or 0.0) >= _LEAST_WIDTH_OF_SHORT:
            yield deeper
        if self._wanted.init == "fresh":
            yield self._plan(cut, depths[num_fitting - 1], most=_MOST_GROWTH)
            if num_fitting > 1:
                yield self._plan(cut, depths[num_fitting - 2], most=_MOST_GROWTH)

    def _plan(self, cut: Cut, depth: Depth, width: float | None = None, most: float = 1.0) -> tuple[HeadDesign, Plan]:
        shortened = depth.shorten(cut)
        design = design_head(cut.flow.trace, shortened, self._pinned, grows=(width or most) > 1)
        plan = plan_at(design, self.num_heads, self._limit, self._combining, depth, width or 0.0, width or most)
        return design, plan

    def _used(self, plan: Plan) -> float:
        return max(plan.cost.shares_of(self._limit)[:2])

    def is_fast(self, plan: Plan) -> bool:
        """Whether a model takes about the base's memory and time on an accelerator, or as much more as it may compute.

        Narrow heads of a base whose time goes into starting its operators count as fast: fused, they start theirs once.
        """
        return self._is_small or self._slowness(plan) <= self._fast

    def _slowness(self, plan: Plan) -> float:
        shares = plan.cost.shares_of(self._base)
        return max(shares.activations, shares.time)

    def choose(self) -> tuple[HeadDesign, Plan]:
        """The plan at the split point that the user names, or at the one that the automatic rule chooses.

        Raises:
            ConversionError: there is no such split point, or none at all.
            BudgetError: the budget cannot be met.
        """
        if not any(cut.has_parameters for cut in self._cuts):
            raise ConversionError("The base has no parameters that heads could have of their own.")
        return self._automatic() if self._wanted.split_at == "auto" else self._named(self._wanted.split_at)

    def _named(self, name: str) -> tuple[HeadDesign, Plan]:
        cut = named_cut(self._cuts, name)
        if not cut.has_parameters:
            raise ConversionError(f"No parameters follow split point {name!r}, so all heads would be the same.")
        if self._must_shorten and len(depths_behind(self.runs, cut)) == 1:
            raise ConversionError(f"Heads behind {name!r} have no blocks to drop{_BLOCKS} Split earlier, or {_NARROW}")
        design, plan = self.at(cut)
        if plan.width is None or plan.width < (self._wanted.min_width or 0.0):
            raise self._no_fit(plan, f"at split point {name!r}", self._wanted.min_width)
        return design, plan

    def _automatic(self) -> tuple[HeadDesign, Plan]:
        points = preferred([cut.point for cut in self._cuts if cut.has_parameters], self._share)
        slow: list[tuple[HeadDesign, Plan]] = []
        for _, near in groupby(points, key=lambda point: _distance(point, self._share)):
            found = self._best(near)
            if found and self.is_fast(found[1]):
                return found
            if found:
                slow.append(found)
        if slow and self._wanted.depth is not None:
            return slow[0]  # behind a later split there may be no such share of blocks
        if slow:
            return min(slow, key=lambda one: self._slowness(one[1]))
        if self._must_shorten and not self.runs:
            raise ConversionError(f"The base has no blocks that heads could drop{_BLOCKS} Please {_NARROW}")
        # the one that comes nearest: the widest heads, or where none fit, the least cost
        misfits = [plan for _, plan in self._found.values() if plan.split.name not in self._passed]
        if not misfits:
            raise ConversionError("The base has no other split point that heads could have.")
        nearest = max(misfits, key=lambda plan: (plan.width or 0.0, -max(plan.cost.shares_of(self._limit))))
        raise self._no_fit(nearest, "at any split point", _least_width(self._wanted))

    def _best(self, points: Iterable[SplitPoint]) -> tuple[HeadDesign, Plan] | None:
        """The first of some split points that may be chosen, of those that are as fast as the base if there are any.

        Heads that share nothing are chosen only where others are narrower.
        """
        unshared: tuple[HeadDesign, Plan] | None = None
        slow: tuple[HeadDesign, Plan] | None = None
        for point in points:
            design, plan = self.at(named_cut(self._cuts, point.name))
            if point.name in self._passed or not is_eligible(plan, self._wanted):
                continue
            if point.name == "input":
                unshared = design, plan
            elif unshared is None or plan.width >= unshared[1].width * _least_ratio(point):  # type: ignore[operator]
                if self.is_fast(plan):
                    return design, plan
                slow = slow or (design, plan)
        return unshared if unshared and self.is_fast(unshared[1]) else slow or unshared

    def _no_fit(self, plan: Plan, where: str, min_width: float | None) -> BudgetError:
        heads, allowed = self.num_heads, f"a budget of {Budget.of(self._wanted.budget)}"
        if plan.width is not None:
            least, found = f"{min_width:g} of their channels", f"{plan.width:g} (at {plan.split.name!r})"
            return BudgetError(
                f"{heads} heads that keep {least} do not fit {allowed} {where}: they could keep {found}; use fewer "
                "heads, a larger budget or a smaller min_width."
            )
        least = Budget.of(self._wanted.budget).of_limited(plan.cost.shares_of(self._base), ".3f")
        given = [
            f"{name} {value:g}" for name in ("width", "depth") if (value := getattr(self._wanted, name)) is not None
        ]
        if given:
            return BudgetError(
                f"{heads} heads of {' and '.join(given)} do not fit {allowed} {where}: they would cost {least} (at "
                f"{plan.split.name!r}); use fewer heads, a larger budget or smaller ones."
            )
        causes = f" What keeps its width there: {', '.join(plan.keepers[:3])}." if plan.keepers else ""
        return BudgetError(
            f"{heads} heads do not fit {allowed} {where}. The least possible is {least} (at {plan.split.name!r}); use "
            f"fewer heads or a larger budget.{causes}"
        )


def _runs_to_shorten(cuts: list[Cut], wanted: Conversion) -> list[Run]:
    """The runs whose blocks heads may drop.

    Without a block that replaces what it takes a trained network knows nothing, so heads that inherit drop such ones
    only if they are told to: docs/procedure.md, "What heads inherit".
    """
    if wanted.shape == "narrow":
        return []
    runs = find_runs(cuts)
    if wanted.init == "fresh" or wanted.shape == "short" or wanted.depth is not None:
        return runs
    return [run for run in runs if all(block.passes_on for block in run.blocks[1:])]


def choose_num_heads(planner_of: Callable[[int], Planner]) -> Planner:
    """The planner of as many heads as stay as wide as the base and make it no slower, by dropping blocks; at least 2.

    Args:
        planner_of: makes the planner of a number of heads.
    """
    for num_heads in _MANY_HEADS:
        planner = planner_of(num_heads)
        try:
            plan = planner.choose()[1]
        except BudgetError:
            continue
        if plan.depth < 1 and plan.width >= 1 and planner.is_fast(plan):  # type: ignore[operator]
            return planner
    return planner_of(2)


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
