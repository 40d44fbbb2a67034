"""Find the blocks of a network that heads may do without: they give a tensor like the one that they take."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn

from ensemblenet.conversion.flow import Flow
from ensemblenet.conversion.split import Cut
from ensemblenet.conversion.trace import depends_on_input

__all__ = ["Block", "Depth", "Run", "depths_behind", "find_runs", "runs_behind", "tensors_of_twins"]

Signature = tuple[Any, ...]


@dataclass(frozen=True)
class Block:
    """A part of a network between two split points.

    Attributes:
        begin: the split point whose tensor it takes.
        end: the split point whose tensor it gives; its name is the block's.
        nodes: what it runs that depends on that tensor, on the network's input and on parameters.
        kind: the class of the module that it is, if it is one.
    """

    begin: Cut
    end: Cut
    nodes: tuple[fx.Node, ...]
    kind: type | None = None

    @property
    def names(self) -> tuple[str, str]:
        """The split points in front of it and behind it, as a recipe stores them."""
        return self.begin.point.name, self.end.point.name

    @cached_property
    def operations(self) -> Signature:
        """What it runs, in order."""
        return tuple(_operation(self.begin.flow, node) for node in self.nodes)

    @cached_property
    def signature(self) -> Signature:
        """What it runs, in order, with the shapes of its parameters and of its tensors."""
        return tuple(_sizes(self.begin.flow, node) for node in self.nodes), self.operations

    @property
    def keeps_shape(self) -> bool:
        """Whether it gives a tensor of the shape that it takes."""
        return self.begin.point.shape == self.end.point.shape

    @property
    def multiplies(self) -> bool:
        """Whether it has parameters, and matrix products or convolutions."""
        flow = self.begin.flow
        return bool(flow.macs(self.nodes)) and any(flow.parameters_read(node) for node in self.nodes)

    @cached_property
    def is_residual(self) -> bool:
        """Whether what it takes reaches what it gives without passing a layer with parameters."""
        return self._is_passed_by(self.begin.flow.parameters_read)

    @cached_property
    def passes_on(self) -> bool:
        """Whether it does so without passing a matrix product or a convolution: also where the sum is normalised."""
        return self._is_passed_by(lambda node: self.begin.flow.macs([node]))

    def _is_passed_by(self, stops: Callable[[fx.Node], object]) -> bool:
        reached = {self.begin.node}
        for node in self.nodes:
            if not stops(node) and not reached.isdisjoint(self.begin.flow.sources(node)):
                reached.add(node)
        return self.end.node in reached

    def is_like(self, other: Block) -> bool:
        """Whether two blocks run the same operations on tensors of the same shapes.

        Inside of residual blocks sizes may differ, such as the expansion of an inverted bottleneck.
        """
        if self.is_residual and other.is_residual:
            return self.operations == other.operations
        return self.signature == other.signature


@dataclass(frozen=True)
class Run:
    """Like blocks, one behind the other. Heads keep the first, which may change the shape; they may drop the others."""

    blocks: tuple[Block, ...]

    @property
    def num_droppable(self) -> int:
        """How many blocks heads may do without."""
        return len(self.blocks) - 1

    def dropped(self, num_kept: int) -> list[Block]:
        """The blocks that heads are without when they keep so many of those that may be dropped, spread evenly."""
        kept = {step * len(self.blocks) // (num_kept + 1) for step in range(num_kept + 1)}
        return [block for place, block in enumerate(self.blocks) if place not in kept]


def find_runs(cuts: Sequence[Cut]) -> list[Run]:
    """The runs of a network's blocks, in order.

    Modules of one class and one parent that follow each other are blocks, if they are residual behind one that changes
    the shape, or like the one before. So are repeated operations between split points, such as the layers of a loop.
    Of blocks inside of blocks those count of which there are more.

    Example:
        >>> import torch
        >>> from ensemblenet.conversion.split import find_cuts
        >>> from ensemblenet.conversion.trace import trace
        >>> from ensemblenet.models import CifarResNet
        >>> cuts = find_cuts(trace(CifarResNet(depth=14), torch.zeros(2, 3, 32, 32)))
        >>> [[block.end.point.name for block in run.blocks] for run in find_runs(cuts)]
        [['stages.0.block0', 'stages.0'], ['stages.1.block0', 'stages.1'], ['stages.2.block0', 'stages']]
    """
    found = [*_runs_of_modules(cuts), *_repeated(cuts)]
    found.sort(key=lambda run: (-run.num_droppable, run.blocks[0].begin.position))
    chosen: list[Run] = []
    for run in found:
        begin, end = run.blocks[0].begin.position, run.blocks[-1].end.position
        if all(end <= r.blocks[0].begin.position or r.blocks[-1].end.position <= begin for r in chosen):
            chosen.append(run)
    return sorted(chosen, key=lambda run: run.blocks[0].begin.position)


@dataclass(frozen=True)
class Depth:
    """How many of its blocks a head keeps.

    Attributes:
        share: of the blocks that it may drop, those that it keeps.
        dropped: the blocks that it is without, in order.
    """

    share: float
    dropped: tuple[Block, ...] = ()

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """Those of each dropped block."""
        return tuple(block.names for block in self.dropped)

    def shorten(self, cut: Cut) -> Cut:
        """The cut of heads without the dropped blocks."""
        return cut.without([(block.begin, block.end) for block in self.dropped])


def depths_behind(runs: Iterable[Run], cut: Cut) -> list[Depth]:
    """The depths of heads behind a cut, from one block in each run to all.

    Of a number of kept blocks each run has its share; what is left over goes to those whose shares are the most above a
    whole number, of equals to the first.

    Example:
        >>> import torch
        >>> from ensemblenet.conversion.split import find_cuts
        >>> from ensemblenet.conversion.trace import trace
        >>> from ensemblenet.models import CifarResNet
        >>> cuts = find_cuts(trace(CifarResNet(depth=14), torch.zeros(2, 3, 32, 32)))
        >>> [(round(depth.share, 2), len(depth.dropped)) for depth in depths_behind(find_runs(cuts), cuts[0])]
        [(0.0, 3), (0.33, 2), (0.67, 1), (1.0, 0)]
    """
    inside = runs_behind(runs, cut)
    total = sum(run.num_droppable for run in inside)
    return [Depth(number / total, tuple(_dropped(inside, number, total))) for number in range(total)] + [Depth(1.0)]


def runs_behind(runs: Iterable[Run], cut: Cut) -> list[Run]:
    """What heads behind a cut have of some runs, where they may drop any of it."""
    inside = [Run(tuple(block for block in run.blocks if block.begin.position >= cut.position)) for run in runs]
    return [run for run in inside if run.num_droppable > 0]


def _dropped(runs: Sequence[Run], num_kept: int, total: int) -> list[Block]:
    shares = [num_kept * run.num_droppable / total for run in runs]
    kept = [math.floor(share) for share in shares]
    by_rest = sorted(range(len(runs)), key=lambda place: kept[place] - shares[place])
    for place in by_rest[: num_kept - sum(kept)]:
        kept[place] += 1
    return [block for run, number in zip(runs, kept, strict=True) for block in run.dropped(number)]


def tensors_of_twins(blocks: Sequence[Block]) -> list[list[str]] | None:
    """The parameters and buffers of blocks that could stand in each other's places: of each block the names, in order.

    None where a block differs from another in more than the values of these, or shares them with other parts.
    """
    forms = [_Form(block) for block in blocks]
    names = [form.names for form in forms]
    is_shared = len({name for own in names for name in own}) < sum(map(len, names))
    if is_shared or any(form.parts != forms[0].parts or form.lends() for form in forms):
        return None
    return names


class _Form:
    """All of a block but the values of its tensors.

    Attributes:
        parts: what its nodes do, on what, with tensors of which shapes.
        names: of its parameters and buffers, in order.
    """

    def __init__(self, block: Block) -> None:
        self._trace = block.begin.flow.trace
        self._numbers: dict[fx.Node, int] = {block.begin.node: -1}
        self._tensors: dict[str, Tensor] = {}
        self._seen: set[fx.Node] = set()
        self.parts = tuple(self._part(node) for node in block.nodes)

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def lends(self) -> bool:
        """Whether other parts of the network read its tensors too."""
        own = {id(tensor) for tensor in self._tensors.values()}
        for node in self._trace.graph.nodes:
            if node in self._seen:
                if node.op == "get_attr" and not self._seen.issuperset(node.users):
                    return True
            elif not own.isdisjoint(map(id, self._trace.parameters.get(node, {}).values())):
                return True
        return False

    def _part(self, node: fx.Node) -> Any:
        self._seen.add(node)
        part = [self._arguments(node.args), self._arguments(dict(node.kwargs))]
        if node.op == "call_module":
            layer = self._trace.module.get_submodule(str(node.target))
            tensors = {self._trace.names[id(own)]: own for own in (*layer.parameters(), *layer.buffers())}
            plain = {key: value for key, value in vars(layer).items() if isinstance(value, (int, float, str, tuple))}
            part += [type(layer), self._shapes(tensors), plain if tensors else None]
        elif node.op == "get_attr":
            part.append(self._shapes({str(node.target): self._trace.tensor(str(node.target))}))
        else:
            part.append(node.target)
        self._numbers[node] = len(self._numbers)
        return part

    def _shapes(self, tensors: Mapping[str, Tensor]) -> Any:
        self._tensors.update(tensors)
        return [(tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors.values()]

    def _arguments(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value in self._numbers:
                return "node", self._numbers[value]
            if "scalar" in value.meta:
                return value.meta["scalar"]
            # what comes from parameters alone is the block's own; masks and positions are those of all blocks
            return value if depends_on_input(value) else self._part(value)
        if isinstance(value, dict):
            return {key: self._arguments(part) for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            return [self._arguments(part) for part in value]
        return value


def _operation(flow: Flow, node: fx.Node) -> Any:
    return type(flow.trace.module.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def _sizes(flow: Flow, node: fx.Node) -> Any:
    ref = flow.trace.refs.get(node)
    parameters = tuple(tuple(parameter.shape) for parameter in flow.parameters_read(node))
    return parameters, None if ref is None else ref.shape


def _block(begin: Cut, end: Cut) -> Block:
    flow = begin.flow
    between = flow.between(begin.node, begin.position, end.node, end.position)
    nodes = [node for node in between if flow.order[node] > begin.position]
    return Block(begin, end, tuple(node for node in nodes if not flow.can_repeat(node, end.position)))


def _may_be_dropped(block: Block) -> bool:
    """Whether the network can run without a block: nothing of it but its tensor is used elsewhere, or lasts."""
    if not (block.keeps_shape and block.multiplies):
        return False
    inside = set(block.nodes) - {block.end.node}
    if any(block.begin.flow.lasts(node) for node in block.nodes):
        return False
    return not any(user not in block.nodes for node in inside for user in block.begin.flow.size_readers(node))


def _runs_of_modules(cuts: Sequence[Cut]) -> list[Run]:
    """Runs of modules: of one class and one parent, each of which takes what the one before gives."""
    families: dict[tuple[str, type], list[Block]] = defaultdict(list)
    flow = cuts[0].flow
    first_nodes = _first_nodes(flow)
    for end in cuts:
        for name in flow.trace.aliases.get(end.node, []):
            first = [position for position in first_nodes.get(name, []) if position <= end.position]
            before = [cut for cut in cuts if first and cut.position < first[-1]]
            if not before:
                continue
            kind = type(flow.trace.module.get_submodule(name))
            block = replace(_block(before[-1], end), kind=kind)
            if all(name in (node.meta.get("stack") or ()) for node in block.nodes):
                families[name.rpartition(".")[0], kind].append(block)
    return [run for blocks in families.values() for run in _runs(blocks)]


def _runs(blocks: Sequence[Block]) -> list[Run]:
    """Blocks in order, cut into runs in front of each that must stay."""
    runs: list[list[Block]] = []
    for block in blocks:
        before = runs[-1][-1] if runs else None
        follows = before is not None and before.end is block.begin and _may_be_dropped(block)
        if follows and (block.is_like(before) or (_begins(before) and block.is_residual)):  # type: ignore[arg-type]
            runs[-1].append(block)
        else:
            runs.append([block])
    return [Run(tuple(run)) for run in runs if len(run) > 1]


def _begins(block: Block) -> bool:
    """Whether a module changes the shape, so that like blocks without that change may follow."""
    return not block.keeps_shape and block.kind is not nn.Sequential


def _first_nodes(flow: Flow) -> dict[str, list[int]]:
    """Of each call of a module, by its name, the position of its first node."""
    found: dict[str, list[int]] = defaultdict(list)
    before: set[str] = set()
    for node, position in flow.order.items():
        stack = node.meta.get("stack")
        if stack is None:
            continue
        for name in set(stack) - before:
            found[name].append(position)
        before = set(stack)
    return found


def _repeated(cuts: Sequence[Cut]) -> list[Run]:
    """Runs of operations that are repeated between split points, whatever modules they are in."""
    steps = [_block(begin, end) for begin, end in pairwise(cuts)]
    signatures = [step.signature for step in steps]
    numbers = {signature: number for number, signature in enumerate(signatures)}
    row = [numbers[signature] for signature in signatures]
    found: list[Run] = []
    for period in range(1, len(row) // 2 + 1):
        start = 0
        while start + period < len(row):
            length = 0
            while start + length + period < len(row) and row[start + length] == row[start + length + period]:
                length += 1
            if length >= period:
                found += _runs(_aligned(cuts, start, length + period, period))
            start += length + 1
    return found


def _aligned(cuts: Sequence[Cut], start: int, length: int, period: int) -> list[Block]:
    """A repetition, cut where most blocks end as modules do."""
    number = length // period
    starts = range(start, start + length - number * period + 1)
    ends = {first: cuts[first : first + number * period + 1 : period] for first in starts}
    aliases = cuts[0].flow.trace.aliases
    best = max(starts, key=lambda first: (sum(bool(aliases.get(cut.node)) for cut in ends[first]), -first))
    chosen = ends[best]
    return [_block(begin, end) for begin, end in pairwise(chosen)]
