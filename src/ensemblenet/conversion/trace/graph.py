"""A traced network: its graph, and the ATen calls behind every node."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from ensemblenet.cost import ROOFLINE, Cost
from ensemblenet.ensemble import as_tuple
from ensemblenet.inputs import Inputs, num_examples
from ensemblenet.operations import Event, TensorRef
from ensemblenet.work import sum_work

__all__ = ["BY_HAND", "GraphRunner", "NodeError", "Trace", "Trial", "arguments", "depends_on_input", "drop_unused"]

BY_HAND = "A network that cannot be traced can be given by hand: ensemblenet.EnsembleNet(trunk, heads)."


@dataclass(frozen=True)
class Trial:
    """Inputs of another size that the base has taken, and what it gave.

    Attributes:
        arguments: the graph's arguments.
        expected: the base's outputs.
    """

    arguments: tuple[Any, ...]
    expected: tuple[Tensor, ...]


@dataclass
class Trace:
    """A traced network: its graph, and the ATen calls behind every node.

    Attributes:
        module: a private copy of the base, whose modules the graph names.
        graph: the graph, for both modes.
        events: the ATen calls in order.
        inputs: what its inputs are.
        tensors: the input tensors that it was traced on.
        aliases: for a node, the names of the modules whose output it is, innermost first.
        refs: for a node of one tensor, that tensor.
        notes: what the user should know about the conversion.
        trials: other numbers of examples and other sizes, on which the graph gives what the base gives.
    """

    module: nn.Module
    graph: fx.Graph
    events: list[Event]
    inputs: Inputs
    tensors: list[Tensor]
    aliases: dict[fx.Node, list[str]]
    refs: dict[fx.Node, TensorRef]
    notes: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)

    @cached_property
    def work(self) -> list[tuple[fx.Node, list[float]]]:
        """What each ATen call does, and its node; see [`ensemblenet.work.work_of`][]."""
        examples, batch = self.num_examples, ROOFLINE.batch
        return [(event.node, sum_work(event.macs, event.traffic, examples, batch)) for event in self.events]

    @cached_property
    def names(self) -> dict[int, str]:
        """By the ids of parameters and buffers, the one name that each has in events, however many layers share it."""
        return {id(tensor): name for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers())}

    @cached_property
    def parameters(self) -> dict[fx.Node, dict[str, nn.Parameter]]:
        """The parameters that each node reads, by their names in the base."""
        found: dict[fx.Node, dict[str, nn.Parameter]] = {}
        for node in self.graph.nodes:
            name = str(node.target)
            if node.op == "call_module":
                layer = self.module.get_submodule(name)
                found[node] = {self.names[id(parameter)]: parameter for parameter in layer.parameters()}
            elif node.op == "get_attr" and isinstance(tensor := self.tensor(name), nn.Parameter):
                found[node] = {name: tensor}
        return found

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by its name."""
        owner, _, attribute = name.rpartition(".")
        return getattr(self.module.get_submodule(owner), attribute)

    def cost(self, nodes: Iterable[fx.Node]) -> Cost:
        """What a part of the base costs."""
        nodes = set(nodes)
        sizes = {id(p): p.numel() for node in nodes for p in self.parameters.get(node, {}).values()}
        return ROOFLINE.cost(sum(sizes.values()), [work for node, work in self.work if node in nodes])

    @property
    def num_examples(self) -> int:
        """N, of the inputs that it was traced on."""
        return num_examples(self.tensors)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The inputs that it was traced on, as the graph's arguments."""
        return arguments(self.inputs, self.tensors)

    @property
    def is_called_by_name(self) -> bool:
        """Whether arguments by position would be other ones than the base's, which has more between them."""
        names = [str(node.target) for node in self.placeholders]
        return isinstance(self.inputs.tree, dict) and names != parameter_names(self.module)[: len(names)]

    @property
    def placeholders(self) -> list[fx.Node]:
        """The nodes of the network's arguments."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @cached_property
    def input_nodes(self) -> list[fx.Node]:
        """The nodes of the input tensors: arguments, or parts of them."""
        return [node for node in self.graph.nodes if "input" in node.meta]

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes whose values the network returns."""
        return next(iter(reversed(self.graph.nodes))).all_input_nodes


def parameter_names(module: nn.Module) -> list[str]:
    """The names of the arguments that a module's forward takes by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds]


def arguments(inputs: Inputs, tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Values in the places of the input tensors, as the graph's arguments: one for each argument of the network."""
    tree = inputs.build(tensors)
    return tuple(tree.values()) if isinstance(tree, dict) else as_tuple(tree)


def depends_on_input(node: fx.Node) -> bool:
    """Whether a node's value comes from the network's input, not only from its parameters."""
    if "from_input" not in node.meta:
        node.meta["from_input"] = "input" in node.meta or any(
            depends_on_input(argument) for argument in node.all_input_nodes if "scalar" not in argument.meta
        )
    return node.meta["from_input"]


def drop_unused(graph: fx.Graph) -> None:
    """Erase nodes whose values nobody reads, unless they write in place or Python has read them."""
    for node in reversed(list(graph.nodes)):
        is_needed = node.op in ("placeholder", "output") or not node.meta.keys().isdisjoint(
            ("effect", "escaped", "input")
        )
        if not node.users and not is_needed:
            graph.erase_node(node)


class NodeError(Exception):
    """A node of a graph that cannot run."""

    def __init__(self, node: fx.Node, cause: object) -> None:
        super().__init__()
        self.node = node
        self.message = f"{node.meta.get('line', node.name)}: {str(cause).split(chr(10) + chr(10))[0]}"

    def __str__(self) -> str:  # FX adds its own lines to an error's arguments
        return self.message


class GraphRunner(fx.Interpreter):
    """Runs a graph node by node, so that an error names its node."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        try:
            return super().run_node(n)
        except NodeError:
            raise
        except Exception as error:
            raise NodeError(n, f"{type(error).__name__}: {error}") from error
