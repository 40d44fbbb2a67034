"""Write the graph of K equal heads as one graph over all of them.

Every operation of the first head writes what does the same for all heads, in the layout that suits it
([`ensemblenet.operations.Layout`][]); changes of layout are written only where an operation asks for another. One that
does not say how it is fused runs by `torch.vmap` over the stacked tensors, or, where that fails, for one head after
another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map

from ensemblenet.heads.fallback import Looped, Mapped, Slot
from ensemblenet.heads.stacks import Stack
from ensemblenet.operations import FIRST, FOLDED, SHARED, Layout, Value, fusing_operation, operation_named
from ensemblenet.operations.coupling import name_of
from ensemblenet.operations.fusion import fold, repeat, unfold

__all__ = ["Program", "has_hooks"]


class Program:
    """The graph of all heads while it is written; operations see it as [`ensemblenet.operations.Program`][].

    Attributes:
        num_heads: K.
        stacks: the stacked tensors, which are the graph's inputs behind the features.
        by_vmap: nodes without a rule that run by `torch.vmap`.
        looped: nodes without a rule that run for one head after another.

    Args:
        heads: the heads, all alike.
        graph: of each of them.
        examples: what its nodes gave the first head for an example batch, in fake tensors.
        tied: the ids of parameters that must not be moved, because not one head alone has them.

    Example:
        What a program has written for a fused model:

        >>> from ensemblenet import EnsembleNet, fuse
        >>> model = fuse(EnsembleNet(nn.Identity(), [nn.Linear(8, 3) for _ in range(2)]), torch.randn(4, 8))
        >>> fusion = model.fusion
        >>> fusion.program(torch.randn(4, 8), *(stack.value() for stack in fusion.stacks)).shape
        torch.Size([2, 4, 3])
    """

    def __init__(
        self, heads: Sequence[nn.Module], graph: fx.Graph, examples: dict[fx.Node, Any], tied: set[int]
    ) -> None:
        self.num_heads = len(heads)
        self.stacks: list[Stack] = []
        self.by_vmap: list[str] = []
        self.looped: list[str] = []
        self._heads = heads
        self._head_graph = graph
        self._examples = examples
        self._mode = next(example.fake_mode for example in examples.values() if isinstance(example, FakeTensor))
        self._tied = tied
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._values: dict[fx.Node, Value] = {}
        self._stacked: dict[tuple[int, ...], fx.Node] = {}

    def write(self) -> fx.GraphModule:
        """Write the graph of all heads: from the features and the stacked tensors to the outputs (K, N, C, *)."""
        for node in self._head_graph.nodes:
            if node.op == "placeholder":
                self._last_input = self._graph.placeholder("features")
                self._values[node] = Value(self._last_input, SHARED)
            elif node.op == "output":
                self._graph.output(self.first(node.args[0]))
            else:
                self._values[node] = self._write(node)
        return fx.GraphModule(self._root, self._graph, class_name="Heads")

    def _write(self, node: fx.Node) -> Value:
        if node.op == "get_attr":
            return self._attribute(node)
        layer = self.module(node) if node.op == "call_module" else None
        if layer is not None and any(has_hooks(own) or is_parametrized(own) for own in self.modules(node)):
            return self._loop(node)
        operation = operation_named(name_of(node)) if layer is None else fusing_operation(layer)
        value = None if operation is None else operation.fuse(self, node)
        if value is not None:
            return value
        has_state = layer is not None and next(chain(layer.parameters(), layer.buffers()), None) is not None
        if self.is_shared(node) and not has_state and node.target != "":  # a whole head may leave something to chance
            return self.same(node, SHARED)
        return self._map(node) or self._loop(node)

    # -- what operations read: see `ensemblenet.operations.Program`

    def module(self, node: fx.Node) -> Any:
        return self._heads[0].get_submodule(str(node.target))

    def modules(self, node: fx.Node) -> list[Any]:
        return [head.get_submodule(str(node.target)) for head in self._heads]

    def value(self, argument: Any) -> Value:
        return self._values[argument] if isinstance(argument, fx.Node) else Value(argument, SHARED)

    def set_value(self, argument: fx.Node, value: Value) -> None:
        self._values[argument] = value

    def layouts(self, node: fx.Node) -> set[Layout]:
        return {self._values[argument].layout for argument in node.all_input_nodes}

    def is_shared(self, node: fx.Node) -> bool:
        return self.layouts(node) <= {SHARED}

    def shape(self, node: Any) -> tuple[int, ...]:
        example = self._examples.get(node) if isinstance(node, fx.Node) else None
        return tuple(example.shape) if isinstance(example, Tensor) else ()

    def is_tensor(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and isinstance(self._examples.get(node), Tensor)

    # -- what operations write

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._graph.call_function(function, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self._graph.call_method(name, args, kwargs)

    def run(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> fx.Node:
        name = name.replace(".", "_")
        while getattr(self._root, name, module) is not module:
            name += "_"
        self._root.add_module(name, module)
        return self._graph.call_module(name, args, kwargs)

    def parameter(self, node: fx.Node, name: str) -> fx.Node | None:
        owner, _, name = f"{node.target}.{name}".rpartition(".")
        return self._stack(owner, name)

    def first(self, argument: Any) -> Any:
        value = self.value(argument)
        if value.layout is FIRST:
            return value.node
        return self.call(unfold if value.layout is FOLDED else repeat, value.node, self.num_heads)

    def folded(self, argument: Any) -> Any:
        value = self.value(argument)
        return value.node if value.layout is FOLDED else self.call(fold, self.first(argument))

    def same(
        self, node: fx.Node, layout: Layout, given: dict[Any, fx.Node] | None = None, method: str | None = None
    ) -> Value:
        given = given or {}
        args, kwargs = fx.map_arg(  # type: ignore[misc]
            (node.args, node.kwargs), lambda argument: given.get(argument, self._values[argument].node)
        )
        if method is not None:
            return Value(self.method(method, *args, **kwargs), layout)
        if node.op == "call_module":
            return Value(self.run(str(node.target), self.module(node), *args, **kwargs), layout)
        return Value(self._graph.create_node(node.op, node.target, args, kwargs), layout)

    # -- the heads' tensors

    def _attribute(self, node: fx.Node) -> Value:
        owner, _, name = str(node.target).rpartition(".")
        owners = [head.get_submodule(owner) for head in self._heads]
        tensors = [getattr(owner, name) for owner in owners]
        if isinstance(tensors[0], nn.Parameter) or not all(torch.equal(tensors[0], other) for other in tensors):
            return Value(self._stack(owner, name), FIRST)
        return Value(self.run(str(node.target), _Constant(owners[0], name)), SHARED)

    def _stack(self, owner: str, name: str) -> fx.Node | None:
        owners = [head.get_submodule(owner.removeprefix(".")) for head in self._heads]
        tensors = [module._parameters.get(name, module._buffers.get(name)) for module in owners]
        if tensors[0] is None:
            return None
        key = tuple(map(id, tensors))
        if key not in self._stacked:
            self.stacks.append(Stack(owners, name, lay=not self._tied.intersection(key)))
            with self._graph.inserting_after(self._last_input):
                self._last_input = self._graph.placeholder("stacked")
                # the argument's name: FX makes the node's unique, not this one, and then one would overwrite another
                self._last_input.target = self._last_input.name
            self._stacked[key] = self._last_input
        return self._stacked[key]

    # -- operations without a rule

    def _map(self, node: fx.Node) -> Value | None:
        """Run an operation by `torch.vmap`, if a trial on fake tensors succeeds."""
        function, names, tensors = as_function(node), [], []
        if node.op == "call_module":
            function = self.module(node)
            if next(function.buffers(), None) is not None:
                return None  # what it does to them is its own affair
            names = [name for name, _ in function.named_parameters()]
            tensors = list(function.parameters())
        template, inputs, stacked = self._template(node)
        if not names and not any(stacked):
            return None
        mapped = Mapped(function, template, stacked, names)
        try:
            with self._mode, torch.enable_grad():  # inside of vmap, PyTorch may choose what has no gradient
                values = [self._example(self._examples[x], own) for x, own in zip(inputs, stacked, strict=True)]
                got = mapped(*values, *(self._example(tensor, True) for tensor in tensors))
                if isinstance(got, Tensor) and got.requires_grad:
                    got.backward(torch.ones_like(got))
        except Exception:  # whatever it is: the loop can do it
            return None
        if not isinstance(got, Tensor) or tuple(got.shape) != (self.num_heads, *self.shape(node)):
            return None
        self.by_vmap.append(node.name)
        stacks = [self.parameter(node, name) for name in names]
        return Value(self.run(f"vmap_{node.name}", mapped, *self._inputs(inputs, stacked), *stacks), FIRST)

    def _loop(self, node: fx.Node) -> Value:
        """Run an operation for one head after another."""
        functions = self.modules(node) if node.op == "call_module" else [as_function(node)] * self.num_heads
        template, inputs, stacked = self._template(node)
        self.looped.append(node.name)
        looped = Looped(functions, template, stacked)
        return Value(self.run(f"loop_{node.name}", looped, *self._inputs(inputs, stacked)), FIRST)

    def _template(self, node: fx.Node) -> tuple[Any, list[fx.Node], list[bool]]:
        """A node's arguments with slots for values, the nodes whose values go there, and which of these have heads."""
        inputs = node.all_input_nodes
        template = fx.map_arg((node.args, node.kwargs), lambda argument: Slot(inputs.index(argument)))  # type: ignore
        return template, inputs, [self._values[argument].layout is not SHARED for argument in inputs]

    def _inputs(self, inputs: list[fx.Node], stacked: list[bool]) -> list[Any]:
        return [self.first(node) if own else self.value(node).node for node, own in zip(inputs, stacked, strict=True)]

    def _example(self, example: Any, own: bool) -> Any:
        """What all heads have of a value, its tensors with gradients where they can have some."""

        def of_all(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.detach().requires_grad_(leaf.is_floating_point() or leaf.is_complex())
            return torch.stack([leaf] * self.num_heads) if own else leaf.clone()

        return tree_map(of_all, example)


class _Constant(nn.Module):
    """A buffer that is the same in all heads."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.owners = (owner,)  # in a tuple: the module belongs to its head
        self.name = name

    def forward(self) -> Tensor:
        """The first head's."""
        return getattr(self.owners[0], self.name)


def as_function(node: fx.Node) -> Callable[..., Any]:
    """The function of a node, or one that calls its method."""
    if node.op != "call_method":
        return node.target  # type: ignore[return-value]
    name = str(node.target)
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


def has_hooks(layer: nn.Module, recurse: bool = True) -> bool:
    """Whether a layer or a part of it has hooks; only a call of the module itself runs them."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, table) for module in (layer.modules() if recurse else [layer]) for table in tables)
