"""Find the places where a network can be cut in two, and cut it there."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import fx
from torch.utils._pytree import tree_map

from ensemblenet.conversion.trace import TensorRef, Trace, depends_on_input, refs
from ensemblenet.cost import Cost, count_parameters
from ensemblenet.errors import ConversionError

__all__ = ["Cut", "SplitPoint", "cut_graph", "find_cuts", "named_cut"]


@dataclass(frozen=True)
class SplitPoint:
    """A place in a network where one tensor alone is alive: all later layers depend on it alone.

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
        trunk: the trunk's nodes.
        head: the head's nodes; what depends on parameters alone may be in both.
        trunk_cost: what the trunk costs.
        has_parameters: whether heads would own any; without, all heads would be the same.
    """

    point: SplitPoint
    node: fx.Node
    trunk: list[fx.Node]
    head: list[fx.Node]
    trunk_cost: Cost
    has_parameters: bool


def find_cuts(trace: Trace) -> list[Cut]:
    """All split points of a network, from its input (no shared trunk) to its output.

    A tensor that the head would overwrite is none: heads would overwrite each other's input.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from ensemblenet.conversion.trace import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [cut.point.name for cut in find_cuts(trace(net, torch.zeros(3, 4)))]
        ['input', '0', '1']
    """
    order = {node: index for index, node in enumerate(trace.graph.nodes) if node.op != "output"}
    overwritten = _last_overwritten(trace, order)
    total = Cost(count_parameters(trace.module), sum(trace.macs.values()))
    taken: set[str] = set()
    cuts = []
    for node, position in _bottlenecks(trace, order):
        if overwritten.get(trace.refs[node].id, -1) > position:
            continue
        effects = {n for n in order if "effect" in n.meta}
        trunk = _needed({node, *(n for n in effects if order[n] <= position)}, order, stop=None)
        head = _needed({trace.output, *(n for n in effects if order[n] > position)}, order, stop=node)
        cost = trace.cost(trunk)
        parameters, macs = cost.share_of(total)
        name, aliases = _names(trace, node, taken)
        point = SplitPoint(name, aliases, trace.refs[node].shape, parameters, macs)
        has_parameters = any(trace.parameters.get(n) for n in head)
        cuts.append(Cut(point, node, trunk, head, cost, has_parameters))
    return cuts


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


def _bottlenecks(trace: Trace, order: dict[fx.Node, int]) -> list[tuple[fx.Node, int]]:
    """Tensors that are the only one alive after some node, each with the position of that node."""
    last_use: dict[fx.Node, int] = {}
    for node in order:
        if depends_on_input(node) and "scalar" not in node.meta:
            users = [order.get(user, len(order)) for user in node.users if "scalar" not in user.meta]
            last_use[node] = max(users, default=-1)
    found: dict[fx.Node, int] = {}
    alive: set[fx.Node] = set()
    for node, position in order.items():
        alive = {other for other in alive if last_use[other] > position}
        if last_use.get(node, -1) > position:
            alive.add(node)
        if len(alive) == 1:
            (only,) = alive
            if only in trace.refs and only is not trace.output:
                found.setdefault(only, position)
    return sorted(found.items(), key=operator.itemgetter(1))


def _last_overwritten(trace: Trace, order: dict[fx.Node, int]) -> dict[int, int]:
    """For each tensor, the position of the last node that writes into its memory."""
    memory: dict[int, int] = {}
    writes: dict[int, int] = {}
    for event in trace.events:
        schema = event.op._schema
        source = None
        for value, argument in zip(event.args, schema.arguments, strict=False):
            if argument.alias_info is None or not isinstance(value, TensorRef):
                continue
            source = memory.setdefault(value.id, value.id)
            if argument.alias_info.is_write:
                writes[source] = order[event.node]
        for ref in refs(event.out):
            memory.setdefault(ref.id, source if source is not None else ref.id)
    return {tensor: writes[root] for tensor, root in memory.items() if root in writes}


def _needed(ends: set[fx.Node], order: dict[fx.Node, int], stop: fx.Node | None) -> list[fx.Node]:
    """The nodes that the ends depend on, in order, up to `stop`."""
    found: set[fx.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node is stop or node in found:
            continue
        found.add(node)
        if "scalar" not in node.meta:
            waiting += node.all_input_nodes
    return [node for node in order if node in found and "scalar" not in node.meta]


def _names(trace: Trace, node: fx.Node, taken: set[str]) -> tuple[str, tuple[str, ...]]:
    """The name of a split point and its other names; names that occur twice are numbered."""
    if node.op == "placeholder":
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


def cut_graph(
    trace: Trace,
    nodes: list[fx.Node],
    entry: fx.Node,
    end: fx.Node,
    base_size: Callable[[fx.Node], bool] = lambda node: False,
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copy a part of the graph into one of its own.

    A size that was read from a tensor outside the part is recomputed from the part's input (if it follows the batch
    size) or written as a number.

    Args:
        trace: the traced network.
        nodes: the part, in order, without its entry.
        entry: the node whose tensor is the part's input.
        end: the node whose tensor is its output.
        base_size: whether a size of a tensor inside the part is written as the number that it is in the base.

    Returns:
        The graph, and where each node went.
    """
    graph = fx.Graph()
    copies = {entry: graph.placeholder("x" if entry.op != "placeholder" else str(entry.target))}
    sizes: dict[fx.Node, Any] = {}

    def scalar(node: fx.Node) -> Any:
        if node not in sizes:
            sizes[node] = copy_scalar(node)
        return sizes[node]

    def copy_scalar(node: fx.Node) -> Any:
        source = node.args[0]
        if node.op == "call_method" and isinstance(source, fx.Node):
            if source not in copies:
                return outside(node)
            if base_size(node):
                return node.meta["scalar"]
            return graph.node_copy(node, lambda argument: copies[argument])
        if node.target is getattr:
            return graph.call_function(getattr, (copies[entry], "device"))
        operands = [scalar(argument) if isinstance(argument, fx.Node) else argument for argument in node.args]
        if not any(isinstance(operand, fx.Node) for operand in operands):
            return node.meta["scalar"]
        assert callable(node.target)
        return graph.call_function(node.target, tuple(operands))

    def outside(node: fx.Node) -> Any:
        value = node.meta["scalar"]
        if not node.meta["follows_batch"]:
            return value
        rows = trace.refs[entry].shape[0]
        size = graph.call_method("size", (copies[entry], 0))
        if value == rows:
            return size
        return graph.call_function(operator.floordiv, (graph.call_function(operator.mul, (size, value)), rows))

    def argument(value: fx.Node) -> Any:
        return scalar(value) if "scalar" in value.meta else copies[value]

    for node in nodes:
        if node.op != "placeholder":
            copies[node] = _copy_node(graph, node, argument)
    graph.output(copies[end])
    return graph, copies


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
