"""Which sizes of a part of a network are one and the same number: the equations of its operations, solved.

An operation that says nothing keeps the sizes of all it touches, so an unknown one costs width, never correctness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch
from torch import fx

from ensemblenet.conversion.flow import Skipped
from ensemblenet.conversion.parametrised import singular_vectors
from ensemblenet.conversion.trace import Event, TensorRef, Trace, refs
from ensemblenet.operations import Operation, operation_named, operation_of
from ensemblenet.operations.axes import Axis, free, kept, unify
from ensemblenet.operations.coupling import name_of
from ensemblenet.operations.deprecated import Rule, rule

__all__ = ["Equations", "Rule", "rule"]

_NOT_KNOWN = (NotImplementedError, ValueError, IndexError)

Axes = list[Axis]


class Equations:
    """The axes of all tensors of a part of a network, and what its operations say about them.

    Operations see it as [`ensemblenet.operations.Sizes`][].

    Args:
        trace: the traced network.
        nodes: the part: the nodes whose events count.
        entry: the tensor that enters the part.
        entry_axes: its axes.
        pinned: nodes whose tensors keep all their sizes, because running them narrowed has failed.
        skipped: tensors that the part is without, and the earlier ones that are read in their places.

    Attributes:
        values: by tensor, its axes.
        sources: the same of parameters and buffers, by name.
        groups: by node, the axis that counts its groups.
        contracted: by weight, the axes that it sums over, its fan-in.
        biases: the names of biases.
        written: the axes of what layers with weights write.
        inside: by tensor inside of a call that its operation states as a whole, the axes that it is taken to grow with.
        work: the part's ATen calls, and the axes that the MACs of each grow with.
    """

    def __init__(
        self,
        trace: Trace,
        nodes: set[fx.Node],
        entry: TensorRef,
        entry_axes: Axes,
        pinned: set[fx.Node],
        skipped: Skipped,
    ) -> None:
        self.trace = trace
        self._earlier = {trace.refs[end].id: trace.refs[begin] for end, begin in skipped.items()}
        self.values: dict[int, Axes] = {entry.id: entry_axes}
        self.sources: dict[str, Axes] = {}
        self.groups: dict[fx.Node, Axis] = {}
        self.contracted: dict[str, Axes] = {}
        self.biases: set[str] = set()
        self.written: Axes = []
        self.inside: dict[int, Axes] = {}
        self.work: list[tuple[Event, Axes]] = []
        self._weight_of: dict[int, str] = {}  # tensors that are a reshaped weight
        self._parameters = {name for name, _ in trace.module.named_parameters()}
        self._pinned = pinned
        self._layers = {
            node: trace.module.get_submodule(str(node.target))
            for node in trace.graph.nodes
            if node in nodes and node.op == "call_module"
        }
        for layer in self._layers.values():
            for buffer in singular_vectors(layer):
                self.rows(TensorRef(-id(buffer), tuple(buffer.shape), trace.names[id(buffer)]))
        for node, events in groupby(trace.events, key=lambda event: event.node):
            if node in nodes:
                self._apply(node, list(events))
        for node, layer in self._layers.items():
            operation_of(type(layer)).tie(self, node, layer)

    # -- for operations: see `Sizes`

    def axes(self, ref: TensorRef) -> Axes:
        if ref.id in self._earlier:
            return self.axes(self._earlier[ref.id])
        if ref.id not in self.values:
            new = free if ref.source in self._parameters else partial(kept, cause=_named_constant(ref.source))
            self.values[ref.id] = self._source(ref, new) if ref.source else [kept(size) for size in ref.shape]
        return self.values[ref.id]

    def rows(self, ref: TensorRef) -> None:
        if ref.source and ref.source not in self._parameters:
            first, *others = ref.shape
            self.sources.setdefault(ref.source, [free(first), *map(kept, others)])

    def vector(self, ref: TensorRef | None, axis: Axis) -> None:
        if ref is None:
            return
        if ref.source and ref.id not in self.values:
            self.values[ref.id] = self._source(ref, free)
        unify(self.axes(ref)[0], axis)

    def set(self, out: TensorRef | fx.Node, axes: Axes) -> None:
        out = self.trace.refs[out] if isinstance(out, fx.Node) else out
        if tuple(axis.size for axis in axes) != out.shape:
            raise ValueError(f"rule gives sizes {[axis.size for axis in axes]} for a tensor of shape {out.shape}")
        if out.id in self.values:
            for old, new in zip(self.values[out.id], axes, strict=True):
                unify(old, new)
        else:
            self.values[out.id] = axes

    def reorder(self, out: TensorRef, axes: Axes) -> None:
        del self.values[out.id]
        self.set(out, axes)

    def keep(self, value: Any, cause: str | None = None) -> None:
        for ref in refs(value):
            if not self._is_known(ref) and not ref.source:
                self.values[ref.id] = [kept(size, cause) for size in ref.shape]
            for axis in self.axes(ref):
                axis.keep(cause)

    def weight(self, ref: TensorRef, contracted: Axes, written: Axis | None = None) -> None:
        name = ref.source or self._weight_of.get(ref.id)
        if name is not None:
            # of a table of rows that is an output layer too, the fan-in of the latter
            self.contracted[name] = self.contracted.get(name) or contracted
        if written is not None:
            self.written.append(written)

    def bias(self, ref: TensorRef) -> None:
        if ref.source:
            self.biases.add(ref.source)

    def is_weight(self, ref: TensorRef) -> bool:
        return ref.source is not None or ref.id in self._weight_of

    def group(self, node: fx.Node, axis: Axis) -> None:
        self.groups[node] = axis

    def parameter(self, node: fx.Node, name: str) -> Axes:
        ref = self.parameter_ref(node, name)
        assert ref is not None, f"{node.target} has no parameter {name}"
        return self.axes(ref)

    def parameter_ref(self, node: fx.Node, name: str) -> TensorRef | None:
        layer = self._layers[node]
        both = (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False))
        tensor = dict(both).get(name)
        # events number tensors from 0; a parameter's axes are found by its name, whatever its number
        return None if tensor is None else TensorRef(-id(tensor), tuple(tensor.shape), self.trace.names[id(tensor)])

    def value(self, node: fx.Node) -> Axes:
        return self.axes(self.trace.refs[node])

    # -- inside

    def _is_known(self, ref: TensorRef) -> bool:
        return ref.id in self.values or ref.id in self._earlier

    def _source(self, ref: TensorRef, new: Callable[[int], Axis]) -> Axes:
        assert ref.source is not None
        return self.sources.setdefault(ref.source, [new(size) for size in ref.shape])

    def _apply(self, node: fx.Node, events: list[Event]) -> None:
        """State what is known of a node as a whole, or of each of its ATen calls."""
        layer = self._layers.get(node)
        is_kept = node in self._pinned or "keeps_sizes" in node.meta
        try:
            operation = operation_named(name_of(node)) if layer is None else operation_of(type(layer))
            work = None if operation is None else operation.couple_whole(self, node, layer)
        except _NOT_KNOWN:
            work, is_kept = None, True
        if work is None:
            for event in events:
                self._apply_call(event)
        else:
            self.work += [(event, work) for event in events]
            known = self.trace.refs
            self._estimate(events, [known[one] for one in (*node.all_input_nodes, node, *node.users) if one in known])
            self._follow_weight([known[arg] for arg in node.all_input_nodes if arg in known], [known.get(node)])
        if is_kept:
            for event in events:
                self.keep((event.args, event.kwargs, event.out), node.meta.get("line"))

    def _apply_call(self, event: Event) -> None:
        inputs = refs((event.args, event.kwargs))
        operation = _operation_of_operator(event)
        try:
            if any(0 in ref.shape for ref in inputs):
                raise NotImplementedError
            operation.couple(self, event)
        except _NOT_KNOWN:
            self.keep((event.args, event.kwargs, event.out), f"{event.name} in {event.node.meta.get('line')}")
        self._follow_weight(inputs, refs(event.out))
        self.work.append((event, operation.work(self, event) if event.macs else []))

    def _estimate(self, events: list[Event], outside: list[TensorRef]) -> None:
        """Take what is inside of a call to grow like the first tensor of its size around it, or like its output."""
        axes = {math.prod(ref.shape): self.axes(ref) for ref in reversed(outside) if self._is_known(ref)}
        for event in events:
            for ref in chain(*event.traffic):
                if not self._is_known(ref) and ref.source is None:
                    self.inside[ref.id] = axes.get(math.prod(ref.shape), next(iter(axes.values()), []))

    def _follow_weight(self, inputs: list[TensorRef], outs: Iterable[TensorRef | None]) -> None:
        """What is computed from weights alone is the largest of them, in another form."""
        if inputs and all(self.is_weight(ref) for ref in inputs):
            largest = max(inputs, key=lambda ref: math.prod(ref.shape))
            for out in outs:
                if out is not None:
                    self._weight_of[out.id] = largest.source or self._weight_of[largest.id]


def _named_constant(source: str | None) -> str | None:
    """A tensor that is no parameter, in words, as what keeps the sizes of all that it meets."""
    if source is None or not source.startswith("_constant"):
        return source and f"the buffer {source}"
    return "a tensor that is neither a parameter nor a buffer"


def _operation_of_operator(event: Event) -> Operation:
    """The operation of an ATen operator, in place or not; else the pointwise one, or one that knows nothing."""
    names = [event.name, event.name.removesuffix("_")]
    if torch.Tag.pointwise in event.op.tags:
        names.append("pointwise")
    known = (operation_named(name) for name in names)
    return next((one for one in known if one is not None and type(one).couple is not Operation.couple), Operation())
