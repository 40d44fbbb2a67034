"""What each value of a network depends on: its sources, and what has been written into its memory in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import chain
from types import MappingProxyType

from torch import fx, nn

from ensemblenet.conversion.trace import TensorRef, Trace, refs

__all__ = ["Flow", "Skipped"]

Skipped = Mapping[fx.Node, fx.Node]
_NOTHING: Skipped = MappingProxyType({})


class Flow:
    """Which values each node depends on, with what has been written into them in place.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from ensemblenet.conversion.trace import trace
        >>> traced = trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.zeros(3, 4))
        >>> [node.name for node in Flow(traced).trunk(traced.outputs, 9)]
        ['_0', '_1']
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.order = {node: index for index, node in enumerate(trace.graph.nodes) if node.op != "output"}
        self._memory, self._writes = self._follow_memory()
        self.last_read: dict[fx.Node, int] = {}
        for node in self.order:
            users = [self.order.get(user, len(self.order)) for user in node.users if "scalar" not in user.meta]
            if users and "scalar" not in node.meta:
                self.last_read[node] = max(users)
        self._inputs = set(trace.input_nodes)
        # what is written in the memory of an input, a parameter or a buffer lasts: it must happen once
        lasting = {self._root(node) for node in self.order if node in self._inputs or node.op == "get_attr"}
        self._lasting = {write for root in lasting for write in self._writes.get(root, [])}
        self._from_input = self._follow(self._inputs)
        self._learned = self._follow({node for node in self.order if self._has_state(node)})
        self._once = self._follow(self._lasting | {node for node in self.order if "random" in node.meta})

    def _follow_memory(self) -> tuple[dict[int, int], dict[int, list[fx.Node]]]:
        """For each tensor the one whose memory it views, and for each of these the nodes that write into it."""
        memory: dict[int, int] = {}
        writes: dict[int, list[fx.Node]] = {}
        for event in self.trace.events:
            source = None
            values = [*zip(event.args, event.op._schema.arguments, strict=False)]
            values += [(event.kwargs[a.name], a) for a in event.op._schema.arguments if a.name in event.kwargs]
            for value, argument in values:
                if argument.alias_info is None or not isinstance(value, TensorRef):
                    continue
                source = memory.setdefault(value.id, value.id)
                if argument.alias_info.is_write and event.node not in writes.setdefault(source, []):
                    writes[source].append(event.node)
            for ref in refs(event.out):
                memory.setdefault(ref.id, source if source is not None else ref.id)
        return memory, writes

    def _root(self, node: fx.Node) -> int:
        ref = self.trace.refs.get(node)
        return -1 if ref is None else self._memory.get(ref.id, ref.id)

    def last_write(self, node: fx.Node) -> int:
        """The position of the last node that writes into a tensor's memory; -1 if there is none."""
        return max((self.order[write] for write in self._writes.get(self._root(node), [])), default=-1)

    def writes(self, node: fx.Node, before: int) -> list[fx.Node]:
        """The nodes that write into a tensor's memory once it is there, up to a position."""
        writes = self._writes.get(self._root(node), [])
        return [write for write in writes if self.order[node] < self.order[write] <= before]

    def sources(self, node: fx.Node, skipped: Skipped = _NOTHING) -> list[fx.Node]:
        """The nodes that a node depends on; its sizes are not among them."""
        read = [skipped.get(argument, argument) for argument in node.all_input_nodes if "scalar" not in argument.meta]
        written = [write for argument in read for write in self.writes(argument, self.order[node] - 1)]
        return [*read, *written]

    @cached_property
    def _size_readers(self) -> dict[fx.Node, set[fx.Node]]:
        """For each tensor the nodes that read one of its sizes, or a number made of sizes."""
        readers: dict[fx.Node, set[fx.Node]] = {}
        made_of: dict[fx.Node, set[fx.Node]] = {}  # by number, the tensors whose sizes it is made of
        for node in self.order:
            read = [made_of[argument] for argument in node.all_input_nodes if argument in made_of]
            tensors = set().union(*read)
            if "scalar" in node.meta:
                made_of[node] = tensors | {one for one in node.all_input_nodes if "scalar" not in one.meta}
            else:
                for tensor in tensors:
                    readers.setdefault(tensor, set()).add(node)
        return readers

    def _follow(self, begin: set[fx.Node]) -> set[fx.Node]:
        """The nodes that depend on one of some nodes, and these."""
        found = set(begin)
        for node in self.order:
            if not found.isdisjoint(self.sources(node)):
                found.add(node)
        return found

    def _has_state(self, node: fx.Node) -> bool:
        """Whether a node has parameters, or a layer's own buffers."""
        if node.op != "call_module":
            return bool(self.trace.parameters.get(node))
        layer = self.trace.module.get_submodule(str(node.target))
        return next(chain(layer.parameters(), layer.buffers()), None) is not None

    def depends_on_input(self, node: fx.Node, position: int) -> bool:
        """Whether a tensor's value, as it is behind a position, comes from the network's input."""
        return not self._from_input.isdisjoint((node, *self.writes(node, position)))

    def can_repeat(self, node: fx.Node, position: int) -> bool:
        """Whether heads can work a value out again: it comes from inputs alone, or from parameters alone."""
        all_of_it = (node, *self.writes(node, position))
        is_learned = not self._learned.isdisjoint(all_of_it) and not self._from_input.isdisjoint(all_of_it)
        return not is_learned and self._once.isdisjoint(all_of_it)

    def trunk(self, ends: list[fx.Node], position: int) -> list[fx.Node]:
        """The nodes that work out tensors as they are behind a position."""
        lasting = [write for write in self._lasting if self.order[write] <= position]
        written = [write for end in ends for write in self.writes(end, position)]
        return self._needed([*ends, *written, *lasting], stop=set())[0]

    def head(self, entry: fx.Node, position: int, skipped: Skipped = _NOTHING) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes from a tensor, as it is behind a position, to the outputs; and the inputs that they read.

        Args:
            entry: the tensor.
            position: of the trunk's last node.
            skipped: tensors, and the earlier ones that are read in their places.
        """
        lasting = [write for write in self._lasting if self.order[write] > position]
        return self._needed([*self.trace.outputs, *lasting], {entry, *self.writes(entry, position)}, skipped)

    def between(self, entry: fx.Node, position: int, end: fx.Node, end_position: int) -> list[fx.Node]:
        """The nodes from a tensor to a later one, each as it is behind a position, in order."""
        ends = [end, *self.writes(end, end_position)]
        return self._needed(ends, stop={entry, *self.writes(entry, position)})[0]

    def parameters_read(self, node: fx.Node) -> list[nn.Parameter]:
        """The parameters that a node reads: its layer's, or those among its arguments."""
        return [
            parameter
            for one in (node, *node.all_input_nodes)
            if one is node or one.op == "get_attr"
            for parameter in self.trace.parameters.get(one, {}).values()
        ]

    def macs(self, nodes: Iterable[fx.Node]) -> float:
        """The multiply-adds of some nodes."""
        nodes = set(nodes)
        return sum(work[0] for node, work in self.trace.work if node in nodes)

    def size_readers(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that read a size of a tensor, or a number made of it."""
        return self._size_readers.get(node, set())

    def lasts(self, node: fx.Node) -> bool:
        """Whether a node writes into the memory of an input, a parameter or a buffer."""
        return node in self._lasting

    def _needed(
        self, ends: list[fx.Node], stop: set[fx.Node], skipped: Skipped = _NOTHING
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes that the ends depend on, in order, without sizes; and the network's inputs among them."""
        found: set[fx.Node] = set()
        waiting = list(ends)
        while waiting:
            node = waiting.pop()
            if node not in found and node not in stop:
                found.add(node)
                waiting += [] if node in self._inputs else self.sources(node, skipped)
        inputs = [node for node in self.trace.input_nodes if node in found]
        return [node for node in self.order if node in found and node not in self._inputs], inputs
