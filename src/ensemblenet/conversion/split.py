"""Find the places where a network can be cut in two, and cut it there."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import fx
from torch.utils._pytree import tree_map

from ensemblenet.conversion.flow import Flow, Skipped
from ensemblenet.conversion.trace import Trace
from ensemblenet.cost import Cost, count_parameters
from ensemblenet.errors import ConversionError
from ensemblenet.inputs import CheckSizes

__all__ = ["Cut", "SplitPoint", "find_cuts", "head_graph", "named_cut", "sizes_read", "trunk_graph"]

SizeOf = Callable[[fx.Node, int], int]


@dataclass(frozen=True)
class SplitPoint:
    """A place where one tensor that depends on parameters is alive: all later layers depend on it and the inputs alone.

    Attributes:
        name: the outermost module whose output the tensor is, or the operation in its module.
        aliases: the inner modules that end at the same place; `split_at` takes these names too.
        shape: the tensor's shape, (N, *), for two examples.
        parameters_share: the trunk's share of the base's parameters.
        macs_share: the trunk's share of the base's MACs.

    Example:
        >>> import torch, ensemblenet
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        >>> point = ensemblenet.split_points(base, torch.randn(4, 8))[1]
        >>> point.name, point.shape[1:], round(point.macs_share, 2)
        ('0', (64,), 0.73)
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    parameters_share: float
    macs_share: float


@dataclass(frozen=True)
class Cut:
    """A split point in the graph.

    Attributes:
        point: what users see of it.
        node: the node of the tensor that passes from the trunk to the heads.
        position: of the trunk's last node in the graph.
        inputs: the nodes of the network's inputs that heads take beside it.
        trunk: the trunk's nodes.
        head: the head's nodes; what depends on parameters alone, or on inputs alone, may be in both.
        sizes: the nodes of sizes that heads are told by the trunk.
        trunk_cost: what the trunk costs.
        flow: what depends on what in the network.
        skipped: the ends of the blocks that the head is without, and the tensors that are read in their places.
    """

    point: SplitPoint
    node: fx.Node
    position: int
    inputs: list[fx.Node]
    trunk: list[fx.Node]
    head: list[fx.Node]
    sizes: list[fx.Node]
    trunk_cost: Cost
    flow: Flow = field(repr=False)
    skipped: Skipped = field(default_factory=dict)

    @property
    def has_parameters(self) -> bool:
        """Whether heads would own any; without, all heads would be the same."""
        return any(self.flow.trace.parameters.get(node) for node in self.head)

    def without(self, blocks: Iterable[tuple[Cut, Cut]]) -> Cut:
        """The cut of heads without some blocks, each given by the cuts in front of it and behind it, in order.

        Raises:
            ConversionError: a block changes the shape, or lies in the trunk.
        """
        skipped: dict[fx.Node, fx.Node] = {}
        for begin, end in blocks:
            if begin.point.shape != end.point.shape or not self.position <= begin.position < end.position:
                raise ConversionError(
                    f"Heads behind {self.point.name!r} cannot be without what is between {begin.point.name!r} and "
                    f"{end.point.name!r}: that must follow and give a tensor of the shape that it takes."
                )
            skipped[end.node] = skipped.get(begin.node, begin.node)
        return _cut(self.flow, self.point, self.node, self.position, skipped) if skipped else self


def find_cuts(trace: Trace) -> list[Cut]:
    """All split points of a network, from its input (no shared trunk) to its output.

    A head takes the one tensor that depends on parameters and is alive there. What else it needs, such as masks and
    positions, it works out again from the network's inputs. A tensor that the head would overwrite is none: heads
    would overwrite each other's input.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from ensemblenet.conversion.trace import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [cut.point.name for cut in find_cuts(trace(net, torch.zeros(3, 4)))]
        ['input', '0', '1']
    """
    flow = Flow(trace)
    total = replace(trace.cost(trace.graph.nodes), parameters=count_parameters(trace.module))
    places = _bottlenecks(trace, flow)
    # names are given first to the places where one tensor alone is alive: recipes of older versions know no others
    taken: set[str] = set()
    names = {}
    for place in sorted(places, key=lambda place: place.beside):
        names[place.node] = _names(trace, place.node, taken)
    cuts = []
    for node, position, _ in places:
        name, aliases = names[node]
        cut = _cut(flow, SplitPoint(name, aliases, trace.refs[node].shape, 0.0, 0.0), node, position)
        if all(flow.last_write(tensor) <= position for tensor in (node, *cut.inputs)):
            parameters, macs = cut.trunk_cost.share_of(total)
            cuts.append(replace(cut, point=replace(cut.point, parameters_share=parameters, macs_share=macs)))
    return cuts


def _cut(flow: Flow, point: SplitPoint, node: fx.Node, position: int, skipped: Skipped | None = None) -> Cut:
    skipped = skipped or {}
    head, inputs = flow.head(node, position, skipped)
    sizes = [size for size in sizes_read(head) if _is_passed(size, node, {node, *inputs, *head}, skipped)]
    trunk = flow.trunk([node, *(size.args[0] for size in sizes)], position)  # type: ignore[misc]
    return Cut(point, node, position, inputs, trunk, head, sizes, flow.trace.cost(trunk), flow, skipped)


def named_cut(cuts: list[Cut], name: str) -> Cut:
    """The cut whose split point has that name, or has it among its aliases.

    Raises:
        ConversionError: there is none; the message suggests near names.
    """
    for cut in cuts:
        if name == cut.point.name or name in cut.point.aliases:
            return cut
    names = [name for cut in cuts for name in (cut.point.name, *cut.point.aliases)]
    near = get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "the base has no split points."
    raise ConversionError(f"Unknown split point {name!r}: {hint} ensemblenet.split_points(base, x) lists them all.")


class _Place(NamedTuple):
    """A place where a network can be cut: the tensor that passes, and the position of the trunk's last node."""

    node: fx.Node
    position: int
    beside: bool  # whether other tensors are alive, which heads work out again


def _bottlenecks(trace: Trace, flow: Flow) -> list[_Place]:
    """Places where one tensor that depends on inputs and parameters is alive, in order."""
    found: dict[fx.Node, _Place] = {}
    alive: set[fx.Node] = set()
    for node, position in flow.order.items():
        alive = {other for other in alive if flow.last_read.get(other, -1) > position}
        if flow.last_read.get(node, -1) > position:
            alive.add(node)
        moving = [other for other in alive if flow.depends_on_input(other, position)]
        passing = [other for other in alive if not flow.can_repeat(other, position)]
        if len(passing) == 1:
            (only,) = passing
        elif not passing and len(moving) == 1:
            (only,) = moving
        else:
            continue
        if only not in trace.refs or only in trace.outputs:
            continue
        place = _Place(only, position, beside=len({only, *moving, *passing}) > 1)
        if only not in found or (found[only].beside and not place.beside):
            found[only] = place
    if trace.input_nodes[0] not in found:  # heads that share nothing: one input passes, the others go beside it
        position = max(flow.order[node] for node in trace.input_nodes)
        found[trace.input_nodes[0]] = _Place(trace.input_nodes[0], position, beside=True)
    return sorted(found.values(), key=operator.attrgetter("position"))


def sizes_read(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The sizes that nodes are or read, as nodes that read one dimension of a tensor."""
    found: dict[fx.Node, None] = {}
    waiting = [one for node in nodes for one in (node, *node.all_input_nodes) if "scalar" in one.meta]
    for node in waiting:
        if node.target == "size":
            found.setdefault(node)
        elif node.target is not getattr:
            waiting += node.all_input_nodes
    return list(found)


def _is_passed(size: fx.Node, entry: fx.Node, inside: set[fx.Node], skipped: Skipped) -> bool:
    """Whether a head must be told a size: it changes, and no tensor of the head has it."""
    source: Any = size.args[0]
    if skipped.get(source, source) in inside or "varies" not in size.meta:
        return False
    return not ("is_batch" in size.meta and entry.meta.get("batch_dims"))


def _names(trace: Trace, node: fx.Node, taken: set[str]) -> tuple[str, tuple[str, ...]]:
    """The name of a split point and its other names; names that occur twice are numbered."""
    if node is trace.input_nodes[0]:
        return "input", ()
    candidates = list(dict.fromkeys(reversed(trace.aliases.get(node, []))))
    if not candidates:
        operation = str(node.target if isinstance(node.target, str) else node.target.__name__).strip("_")
        owner = node.meta["stack"][-1] if node.meta.get("stack") else ""
        candidates = [f"{owner}.{operation}" if owner else operation]
    unique = []
    for candidate in candidates:
        name, count = candidate, 1
        while name in taken:
            count += 1
            name = f"{candidate}#{count}"
        taken.add(name)
        unique.append(name)
    return unique[0], tuple(unique[1:])


def trunk_graph(trace: Trace, cut: Cut) -> fx.Graph:
    """The graph of the trunk: from the network's arguments to all that heads take."""
    graph = fx.Graph()
    if trace.is_called_by_name:
        graph.placeholder("*_")  # Python takes all arguments behind it by name alone
    copies = {node: graph.placeholder(str(node.target)) for node in trace.placeholders}
    for node in trace.graph.nodes:  # the inputs that are parts of an argument; what is taken of an input is none
        if node.target is operator.getitem and node.args[0] in copies and "input" not in node.args[0].meta:
            copies[node] = _copy_node(graph, node, copies.__getitem__)
    for node, spec, tensor in zip(trace.input_nodes, trace.inputs.tensors, trace.tensors, strict=True):
        if spec.fixed:
            sizes = {dim: tensor.shape[dim] for dim in spec.fixed}
            trace.module.add_module(f"check_{node.name}", CheckSizes(_input_name(node), sizes))
            copies[node] = graph.call_module(f"check_{node.name}", (copies[node],))
    copier = _Copier(graph, copies, trace.input_nodes[0])
    copier.copy(cut.trunk)
    ends = [copies[cut.node], *(copies[node] for node in cut.inputs), *map(copier.scalar, cut.sizes)]
    graph.output(ends[0] if len(ends) == 1 else tuple(ends))
    return graph


def _input_name(node: fx.Node) -> str:
    """An input as the network's signature calls it, with the key inside an argument."""
    if node.op == "placeholder":
        return str(node.target)
    source, key = node.args
    return f"{_input_name(source)}[{key!r}]"  # type: ignore[arg-type]


def head_graph(trace: Trace, cut: Cut, size_of: SizeOf | None = None) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """The graph of a head: from what the trunk gives to the outputs.

    Sizes of the head's own tensors are read from them. Others are given by the trunk, or read from the features where
    they are the number of examples, or written as numbers where they are always the same.

    Args:
        trace: the traced network.
        cut: where the head begins.
        size_of: the size of a tensor of a narrowed head, by its node in the base and the dimension.

    Returns:
        The graph, and where each node went.
    """
    graph = fx.Graph()
    beside = (*cut.inputs, *cut.sizes)
    name = _input_name(cut.node) if cut.node.op == "placeholder" else "features"
    while name in {node.name for node in beside}:
        name += "_"
    copies = {cut.node: graph.placeholder(name)}
    for node in beside:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta["narrowed"] = node.meta.get("scalar")
    copier = _Copier(graph, copies, cut.node, cut.skipped, size_of)
    copier.copy(cut.head)
    outputs = tuple(copies[node] for node in trace.outputs)
    graph.output(outputs[0] if len(outputs) == 1 else outputs)
    return graph, copies


class _Copier:
    """Copies nodes of the base into a graph.

    The copy of a size has the meta "narrowed": the number that it is in a narrowed head, for the traced inputs.
    """

    def __init__(
        self,
        graph: fx.Graph,
        copies: dict[fx.Node, fx.Node],
        entry: fx.Node,
        skipped: Skipped = MappingProxyType({}),
        size_of: SizeOf | None = None,
    ) -> None:
        self.skipped = skipped
        self.graph = graph
        self.copies = copies
        self.entry = entry
        self.size_of = size_of

    def copy(self, nodes: list[fx.Node]) -> None:
        """Copy nodes, in order."""
        for node in nodes:
            self.copies[node] = _copy_node(self.graph, node, self._argument)

    def _argument(self, node: fx.Node) -> Any:
        return self.scalar(node) if "scalar" in node.meta else self.copies[self.skipped.get(node, node)]

    def scalar(self, node: fx.Node) -> Any:
        """The copy of a size, or of a number made of sizes."""
        if node in self.copies:
            return self.copies[node]
        if node.target is getattr:
            return self.graph.call_function(getattr, (self.copies[self.entry], "device"))
        if node.target == "size":
            source: Any = self.skipped.get(node.args[0], node.args[0])  # type: ignore[arg-type, call-overload]
            dim = node.args[1]
            if source in self.copies:
                copy = self.graph.call_method("size", (self.copies[source], dim))
                narrowed = self.size_of(source, dim) if self.size_of else node.meta["scalar"]  # type: ignore[arg-type]
            elif "varies" not in node.meta:
                return node.meta["scalar"]
            else:
                copy = self.graph.call_method("size", (self.copies[self.entry], self.entry.meta["batch_dims"][0]))
                narrowed = node.meta["scalar"]
        else:
            operands = [self.scalar(value) if isinstance(value, fx.Node) else value for value in node.args]
            values = [value.meta["narrowed"] if isinstance(value, fx.Node) else value for value in operands]
            assert callable(node.target)
            narrowed = node.target(*values)
            if not any(isinstance(operand, fx.Node) for operand in operands):
                return narrowed
            copy = self.graph.call_function(node.target, tuple(operands))
        copy.meta["narrowed"] = narrowed
        self.copies[node] = copy
        return copy


def _copy_node(graph: fx.Graph, node: fx.Node, argument: Callable[[fx.Node], Any]) -> fx.Node:
    """Copy a node whose arguments may become plain numbers."""

    def convert(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return argument(value)
        if isinstance(value, slice):
            return slice(convert(value.start), convert(value.stop), convert(value.step))
        return value

    is_atom = lambda value: isinstance(value, slice)  # noqa: E731
    args = tree_map(convert, tuple(node.args), is_leaf=is_atom)
    kwargs = tree_map(convert, dict(node.kwargs), is_leaf=is_atom)
    return graph.create_node(node.op, node.target, args, kwargs, name=node.name)
