"""Design a narrower head from the part of a network that follows a split point, and build it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from ensemblenet.conversion.equations import Equations
from ensemblenet.conversion.head_cost import HeadCost
from ensemblenet.conversion.initialise import Initialiser
from ensemblenet.conversion.parametrised import restart_power_iterations
from ensemblenet.conversion.split import Cut, head_graph, sizes_read, trunk_graph
from ensemblenet.conversion.trace import BY_HAND, GraphRunner, NodeError, TensorRef, Trace, Trial, refs
from ensemblenet.cost import ROOFLINE, Cost
from ensemblenet.ensemble import as_tuple
from ensemblenet.errors import ConversionError
from ensemblenet.operations import LayerSizes, operation_named, operation_of
from ensemblenet.operations.axes import Axis, free, kept, settle
from ensemblenet.operations.coupling import name_of
from ensemblenet.recipe import Blocks, HeadShape
from ensemblenet.work import Traffic, sum_work

__all__ = ["HeadDesign", "build_head", "build_trunk", "check_head", "design_head"]

PROJECTION = "projection"
Sizes = list[Axis]


@dataclass(frozen=True)
class HeadDesign:
    """The solved sizes of a head, from which a head of any width can be built.

    Attributes:
        trace: the traced base.
        cut: where the head begins.
        equations: its sizes.
        entry: the axes of the tensor that its first layer reads.
        projected: the dimension of that tensor which a projection narrows, if any.
        parameters: its parameters' axes, by their names in the base.
        pinned: names of the nodes that keep their sizes.
    """

    trace: Trace
    cut: Cut
    equations: Equations
    entry: Sizes
    projected: int | None
    parameters: dict[str, Sizes]
    pinned: tuple[str, ...]

    def is_projected(self, shape: HeadShape) -> bool:
        """Whether the head begins with a projection at this width; at full width it needs none."""
        if self.projected is None:
            return False
        axis = self.entry[self.projected]
        return axis.value(shape.size) != axis.size

    def blocks(self) -> tuple[Blocks, ...]:
        """In which ways its blocks of channels may narrow, the preferred first."""
        roles = {unknown.role for axes in self.parameters.values() for axis in axes for unknown in axis.unknowns()}
        if "count" in roles:
            return ("fewer", "narrower")
        return ("narrower",) if "inner" in roles else ("fewer",)

    def keepers(self) -> list[str]:
        """What keeps the width of its layers, in words, first what keeps most parameters."""
        numbers: dict[str, int] = {}
        for axes in self.parameters.values():
            unknowns = [unknown for axis in axes for unknown in axis.unknowns()]
            for cause in {unknown.cause for unknown in unknowns if unknown.cause is not None}:
                numbers[cause] = numbers.get(cause, 0) + math.prod(axis.size for axis in axes)
        return sorted(numbers, key=lambda cause: -numbers[cause])

    def cost(self, shape: HeadShape) -> Cost:
        """What one head costs."""
        cost = self._cost(shape.size)
        if self.projected is not None and self.is_projected(shape):
            read, written = self.entry[self.projected].size, self.entry[self.projected].value(shape.size)
            positions = math.prod(axis.size for dim, axis in enumerate(self.entry) if dim != self.projected)
            shapes = ((positions, written), (positions, read), (read, written))
            traffic = Traffic(*((TensorRef(-1, shape, None),) for shape in shapes))
            macs = positions * read * written
            call = sum_work(macs, traffic, self.trace.num_examples, ROOFLINE.batch)
            cost += ROOFLINE.cost(read * written, [call])
        return cost

    @cached_property
    def given(self) -> list[tuple[Any, ...]]:
        """What the base gives heads at the split point, for the traced inputs and for the trace's trials."""
        trace = self.trace
        trunk = fx.GraphModule(trace.module, trunk_graph(trace, self.cut)).eval()
        names = [str(node.target) for node in trace.placeholders]
        tried = [trace.arguments, *(trial.arguments for trial in trace.trials)]
        with torch.no_grad():
            return [as_tuple(trunk(**dict(zip(names, values, strict=True)))) for values in tried]

    @cached_property
    def _cost(self) -> HeadCost:
        return HeadCost(self.equations, self.parameters.values(), self.trace.num_examples)


def design_head(trace: Trace, cut: Cut, pinned: set[fx.Node], *, grows: bool = False) -> HeadDesign:
    """Solve the sizes of a head.

    The tensor that enters keeps its width. Where the head's layers add to it all the way (a residual stream), that
    would tie the width of everything they write to the trunk's; such a stream enters through a linear projection.

    Args:
        trace: the traced base.
        cut: where the head begins.
        pinned: nodes that must keep their sizes.
        grows: whether the head may be wider than the base; such a stream then keeps its width.
    """
    if grows:
        return _solve(trace, cut, pinned, None)
    rank = len(trace.refs[cut.node].shape)
    # the dimensions that may hold the channels, the likelier first
    for dim in {1: [], 2: [1], 3: [2, 1]}.get(rank, [1, rank - 1]):
        design = _solve(trace, cut, pinned, dim)
        stream = set(design.entry[dim].unknowns())
        written = {unknown for axis in design.equations.written for unknown in axis.unknowns()}
        if design.entry[dim].is_free() and stream & written:
            return design
    return _solve(trace, cut, pinned, None)


def _solve(trace: Trace, cut: Cut, pinned: set[fx.Node], projected: int | None) -> HeadDesign:
    ref = trace.refs[cut.node]
    entry = [free(size) if dim == projected else kept(size) for dim, size in enumerate(ref.shape)]
    equations = Equations(trace, set(cut.head), ref, entry, pinned, cut.skipped)
    for output in trace.outputs:
        equations.keep(trace.refs[output])
    _keep_plain_sizes(trace, cut, equations)
    names = {name: p for node in cut.head for name, p in trace.parameters.get(node, {}).items()}
    unique = {id(p): name for name, p in reversed(names.items())}
    parameters = {
        name: equations.sources.get(name) or [kept(size) for size in names[name].shape] for name in unique.values()
    }
    settle(axis for axes in (*equations.values.values(), *equations.sources.values(), entry) for axis in axes)
    kept_names = tuple(sorted(node.name for node in pinned))
    return HeadDesign(trace, cut, equations, entry, projected, parameters, kept_names)


def _keep_plain_sizes(trace: Trace, cut: Cut, equations: Equations) -> None:
    """Keep every size of the head that its code has made a plain number of."""
    escaped = [node for node in trace.graph.nodes if "escaped" in node.meta]
    inside = {cut.node, *cut.head}
    for size in sizes_read(escaped):
        source, dim = size.args
        if source in inside:
            equations.axes(trace.refs[source])[dim].keep()  # type: ignore[index]


class _Narrowed:
    """What operations ask of a design at a width; they see it as [`ensemblenet.operations.Narrowed`][]."""

    def __init__(self, design: HeadDesign, shape: HeadShape) -> None:
        self.design = design
        self.head = shape
        self.events: dict[fx.Node, Any] = {event.node: event for event in design.trace.events}  # the last of a node

    def axes(self, node: fx.Node) -> Sizes:
        ref = self.design.trace.refs.get(node)
        return [] if ref is None else self.design.equations.axes(ref)

    def outputs(self, node: fx.Node) -> list[Sizes]:
        if node in self.design.trace.refs:
            return [self.axes(node)]
        event = self.events.get(node)
        return [] if event is None else [self.design.equations.axes(ref) for ref in refs(event.out)]

    def size(self, axis: Axis) -> int:
        return axis.value(self.head.size)

    def position(self, axis: Axis, offset: int) -> int | None:
        return axis.position(offset, self.head.size)

    def groups(self, node: fx.Node) -> int | None:
        axis = self.design.equations.groups.get(node)
        return None if axis is None else self.size(axis)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.size(axis) for axis in self.axes(node))

    def dimension(self, node: fx.Node, dim: int) -> int:
        """The size of one dimension of a node's tensor."""
        return self.size(self.axes(node)[dim])


def build_head(design: HeadDesign, shape: HeadShape, initialiser: Initialiser) -> tuple[fx.GraphModule, _Copies]:
    """Build one head, with parameters of its own.

    Returns:
        The head, and for each of its graph's nodes the node of the base.
    """
    narrowed = _Narrowed(design, shape)
    cut = design.cut
    graph, copies = head_graph(design.trace, cut, narrowed.dimension)
    for node, copied in copies.items():
        operation = operation_named(name_of(node)) if node.op in ("call_method", "call_function") else None
        if operation is not None and node is not cut.node:
            operation.renumber(narrowed, node, copied)
    tensors = _new_tensors(design, shape, initialiser)
    attributes: dict[str, Any] = {}
    for node, copied in copies.items():
        if copied.op == "get_attr":
            source = design.trace.tensor(str(node.target))
            attributes[str(node.target)] = tensors[id(source)]
        elif copied.op == "call_module":
            attributes[str(node.target)] = _narrow_layer(narrowed, node, tensors)
    if design.is_projected(shape):
        attributes[PROJECTION] = _insert_projection(graph, design, shape, initialiser)
    head = fx.GraphModule(attributes, graph, class_name="Head")  # type: ignore[arg-type]
    initialiser.finish(head)
    if initialiser.init == "fresh" or shape.width < 1:
        restart_power_iterations(head)
    return head, {copied.name: node for node, copied in copies.items()}


_Copies = dict[str, fx.Node]


def build_trunk(trace: Trace, cut: Cut, initialiser: Initialiser) -> fx.GraphModule:
    """Build the trunk from the modules of the trace's private copy of the base."""
    graph = trunk_graph(trace, cut)
    ref = trace.refs[trace.input_nodes[0]]
    equations = Equations(trace, set(cut.trunk), ref, [kept(size) for size in ref.shape], set(cut.trunk), {})
    with torch.no_grad():
        for node in cut.trunk:
            for name, parameter in trace.parameters.get(node, {}).items():
                axes = [kept(size) for size in parameter.shape]
                parameter.copy_(initialiser.tensor(name, parameter, axes, HeadShape(1.0).size, equations))
    trunk = fx.GraphModule(trace.module, graph, class_name="Trunk")
    initialiser.finish(trunk)
    if initialiser.init == "fresh":
        restart_power_iterations(trunk)
    return trunk


def _new_tensors(design: HeadDesign, shape: HeadShape, initialiser: Initialiser) -> dict[int, Tensor]:
    """New parameters and buffers for a head, by the ids of the base's tensors."""
    new: dict[int, Tensor] = {}
    for name, tensor in _read_tensors(design):
        if id(tensor) not in new:
            axes = design.equations.sources.get(name) or [kept(size) for size in tensor.shape]
            new[id(tensor)] = initialiser.tensor(name, tensor, axes, shape.size, design.equations)
    return new


def _read_tensors(design: HeadDesign) -> Iterator[tuple[str, Tensor]]:
    trace = design.trace
    for node in design.cut.head:
        name = str(node.target)
        if node.op == "get_attr":
            yield name, trace.tensor(name)
        elif node.op == "call_module":
            layer = trace.module.get_submodule(name)
            yield from ((trace.names[id(tensor)], tensor) for tensor in (*layer.parameters(), *layer.buffers()))


def _narrow_layer(narrowed: _Narrowed, node: fx.Node, tensors: dict[int, Tensor]) -> nn.Module:
    base = narrowed.design.trace.module.get_submodule(str(node.target))
    # deepcopy takes the new tensors from its memo, so tied weights stay tied
    layer = copy.deepcopy(base, dict(tensors))
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    if isinstance(source, fx.Node):
        outputs = narrowed.outputs(node)
        output = tuple(narrowed.size(axis) for axis in outputs[0]) if outputs else ()
        sizes = LayerSizes(narrowed.shape(source), output, narrowed.groups(node))
        operation_of(type(base)).narrow(layer, base, sizes)
    return layer


def _insert_projection(graph: fx.Graph, design: HeadDesign, shape: HeadShape, initialiser: Initialiser) -> nn.Module:
    assert design.projected is not None
    axis, rank = design.entry[design.projected], len(design.entry)
    if design.projected == rank - 1:
        layer: nn.Module = nn.Linear(axis.size, axis.value(shape.size), bias=False)
    else:
        kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[rank]
        layer = kind(axis.size, axis.value(shape.size), kernel_size=1, bias=False)
    weight = layer.get_parameter("weight")
    initialiser.projection(weight, axis, shape.size)
    layer.to(design.trace.tensors[0].device)
    entry = next(iter(graph.nodes))
    readers = list(entry.users)
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        projected = graph.call_module(PROJECTION, (entry,))
    for reader in readers:
        reader.replace_input_with(entry, projected)
    return layer


def _check_outputs(outputs: Any, trial: Trial, head: fx.GraphModule) -> None:
    got = [tuple(output.shape) for output in as_tuple(outputs)]
    expected = [tuple(output.shape) for output in trial.expected]
    if got != expected:
        last = next(iter(reversed(head.graph.nodes))).all_input_nodes[0]
        raise NodeError(last, f"outputs of shape {got} where {expected} was expected, at another size of the inputs")


class _ShapeChecker(GraphRunner):
    """Runs a head and compares every tensor's shape with the one that the equations give."""

    def __init__(self, head: fx.GraphModule, copies: _Copies, narrowed: _Narrowed) -> None:
        super().__init__(head)
        self.copies = copies
        self.narrowed = narrowed

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and check it."""
        value = super().run_node(n)
        node = self.copies.get(n.name)
        if isinstance(value, Tensor) and node is not None and node is not self.narrowed.design.cut.node:
            expected = self.narrowed.shape(node)
            if node in self.narrowed.design.trace.refs and tuple(value.shape) != expected:
                raise NodeError(n, f"a tensor of shape {tuple(value.shape)} where {expected} was expected")
        return value


def check_head(
    design: HeadDesign, shape: HeadShape, head: fx.GraphModule, copies: _Copies
) -> tuple[fx.Node, str] | None:
    """Run a head in evaluation mode; return the base's node that fails, and why, or None.

    Args:
        design: what the head was built from.
        shape: of the head.
        head: itself.
        copies: for each of its graph's nodes the node of the base.
    """
    checker = _ShapeChecker(head.eval(), copies, _Narrowed(design, shape))
    try:
        with torch.no_grad():
            checker.run(*design.given[0])
            for values, trial in zip(design.given[1:], design.trace.trials, strict=True):
                _check_outputs(GraphRunner(head).run(*values), trial, head)
    except NodeError as error:
        node = copies.get(error.node.name)
        if node is None:
            raise ConversionError(f"The narrowed head fails at {error}. {BY_HAND}") from error
        return node, str(error)
    return None
