"""How the author of an operation's class writes it for all heads at once.

A value of a head is, in the graph of all heads, one of three:

| layout | what it is, for a head's tensor of shape (N, C, *) |
|---|---|
| SHARED | the same for all heads: (N, C, *), or a number |
| FIRST | the heads' tensors stacked: (K, N, C, *) |
| FOLDED | heads folded into channels, head-major: (N, K·C, *) |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn

from ensemblenet.operations.coupling import name_of

__all__ = ["FIRST", "FOLDED", "SHARED", "Layout", "Program", "Value", "aligned", "fold", "repeat", "unfold"]


class Layout(Enum):
    """Where the heads are in a value; see the module.

    Example:
        >>> stacked = torch.zeros(2, 5, 8)  # FIRST: 2 heads, 5 examples, 8 channels
        >>> fold(stacked).shape  # FOLDED
        torch.Size([5, 16])
        >>> [layout.name for layout in Layout]
        ['SHARED', 'FIRST', 'FOLDED']
    """

    SHARED = "shared"
    FIRST = "first"
    FOLDED = "folded"


SHARED = Layout.SHARED
"""The same for all heads."""
FIRST = Layout.FIRST
"""The heads' tensors stacked."""
FOLDED = Layout.FOLDED
"""Heads folded into channels."""


class Value(NamedTuple):
    """A value of all heads: its node in the graph of all heads, and its layout. Of a tuple, that of its tensors.

    Example:
        >>> Value(fx.Graph().placeholder("features"), SHARED).layout.value
        'shared'
    """

    node: Any
    layout: Layout


class Program(Protocol):
    """The graph of all heads, while it is written from the nodes of the first head.

    Attributes:
        num_heads: K.

    Example:
        >>> from ensemblenet import EnsembleNet, fuse
        >>> from ensemblenet.operations import Operation, register
        >>> class Double(nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> @register(Double)
        ... class DoubleOperation(Operation):
        ...     def fuse(self, program, node):
        ...         return Value(program.method("mul", program.first(node.args[0]), 2), FIRST)

        >>> heads = [nn.Sequential(nn.Linear(8, 3), Double()) for _ in range(2)]
        >>> model, x = EnsembleNet(nn.Identity(), heads), torch.randn(4, 8)
        >>> torch.testing.assert_close(fuse(model, x)(x), model(x))
    """

    num_heads: int

    # -- what a rule reads

    def module(self, node: fx.Node) -> Any:
        """The first head's module that a node calls."""
        ...

    def modules(self, node: fx.Node) -> list[Any]:
        """The modules of all heads that a node calls."""
        ...

    def value(self, argument: Any) -> Value:
        """The value of all heads of an argument of a node of the first head."""
        ...

    def set_value(self, argument: fx.Node, value: Value) -> None:
        """Let later nodes read another value: what an operation in place has made of it."""
        ...

    def is_shared(self, node: fx.Node) -> bool:
        """Whether all that a node reads is the same for all heads."""
        ...

    def shape(self, node: Any) -> tuple[int, ...]:
        """The shape of the first head's tensor for an example batch; () for a number."""
        ...

    def is_tensor(self, node: Any) -> bool:
        """Whether a node of the first head gives a tensor, not a number or a tuple."""
        ...

    # -- what a rule writes

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Write the call of a function."""
        ...

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Write the call of a method of the first argument."""
        ...

    def run(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> fx.Node:
        """Write the call of a module, under that name or one like it."""
        ...

    def parameter(self, node: fx.Node, name: str) -> fx.Node | None:
        """The stack (K, *) of a parameter or buffer of the module that a node calls; None where it has none."""
        ...

    def first(self, argument: Any) -> Any:
        """A value as FIRST; a SHARED one is repeated, without a copy."""
        ...

    def folded(self, argument: Any) -> Any:
        """A value as FOLDED; a SHARED one is repeated."""
        ...

    def same(
        self, node: fx.Node, layout: Layout, given: dict[Any, fx.Node] | None = None, method: str | None = None
    ) -> Value:
        """Write the node unchanged on the fused arguments; modules are taken from head 0.

        Args:
            node: of the first head.
            layout: of what comes out.
            given: other nodes to read for some of its arguments.
            method: another operation to call in its place.
        """
        ...


# -- changes of layout


def fold(x: Tensor) -> Tensor:
    """(K, N, C, *) to (N, K·C, *); no copy where the memory lies so already. Channels that lie last there stay last."""
    if x.ndim > 3 and x.stride(2) == 1:
        return x.movedim((0, 2), (-2, -1)).flatten(-2).movedim(-1, 1)
    return x.transpose(0, 1).flatten(1, 2)


def unfold(x: Tensor, num_heads: int) -> Tensor:
    """(N, K·C, *) to (K, N, C, *), without a copy."""
    return x.unflatten(1, (num_heads, -1)).transpose(0, 1)


def repeat(x: Tensor, num_heads: int) -> Tensor:
    """(N, C, *) to (K, N, C, *), without a copy."""
    return x.unsqueeze(0).expand(num_heads, *x.shape)


def aligned(x: Tensor, rank: int) -> Tensor:
    """(K, *) with ones behind K, so that * has that rank."""
    return x.reshape(x.shape[0], *(1,) * (rank - x.ndim + 1), *x.shape[1:])


# -- what several rules do


def arguments_of(node: fx.Node, **defaults: Any) -> list[Any]:
    """The arguments of those names, in the order in which a call has them."""
    names = list(defaults)
    given = dict(zip(names, node.args, strict=False)) | {k: v for k, v in node.kwargs.items() if k in defaults}
    return [given.get(name, defaults[name]) for name in names]


def aligned_value(program: Program, argument: fx.Node, rank: int) -> fx.Node:
    """An argument in a form that broadcasts to (K, *) with * of that rank: a SHARED one does as it is."""
    value = program.value(argument)
    if value.layout is SHARED:
        return value.node
    x = program.first(argument)
    return x if len(program.shape(argument)) == rank else program.call(aligned, x, rank)


def rewritten(program: Program, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Value:
    """Write a node with other arguments; what it reads is FIRST, or SHARED as it is."""

    def read(argument: fx.Node) -> Any:
        value = program.value(argument)
        return value.node if value.layout is SHARED else program.first(argument)

    args, kwargs = fx.map_arg((tuple(args), kwargs), read)  # type: ignore[assignment]
    if node.op == "call_method":
        return Value(program.method(str(node.target), *args, **kwargs), FIRST)
    return Value(program.call(node.target, *args, **kwargs), FIRST)  # type: ignore[arg-type]


def behind_heads(dims: Any) -> Any:
    """A dimension of a head's tensor, or several, in the stack of them; negative ones count from the end in both."""
    if isinstance(dims, int):
        return dims + 1 if dims >= 0 else dims
    return type(dims)(behind_heads(dim) for dim in dims)


# by a function's name, the positions and names of the arguments that are dimensions, and what they are where left out
Dimensions = Mapping[str, tuple[tuple[int, str, Any], ...]]
ALL = object()  # of `Dimensions`: all, where none is named


def fuse_along(program: Program, node: fx.Node, dimensions: Dimensions) -> Value | None:
    """Write a function of named dimensions: the heads are one more in front.

    Args:
        program: that is written.
        node: of the first head.
        dimensions: of the functions that can be written so.
    """
    if name_of(node) not in dimensions:
        return None
    if program.is_shared(node):
        return program.same(node, SHARED)
    if program.value(node.args[0]).layout is SHARED:
        return None
    args, kwargs = list(node.args), dict(node.kwargs)
    for position, name, default in dimensions[name_of(node)]:
        given = args[position] if position < len(args) else kwargs.get(name, default)
        if default is ALL and (given is ALL or given is None):
            given = tuple(range(len(program.shape(node.args[0]))))
        several = given if isinstance(given, (tuple, list)) else [given]
        if not all(isinstance(dim, int) for dim in several):
            return None
        if position < len(args):
            args[position] = behind_heads(given)
        else:
            kwargs[name] = behind_heads(given)
    return rewritten(program, node, args, kwargs)


def per_channel(program: Program, node: fx.Node) -> Value | None:
    """Write what treats every channel alone, such as pooling: heads are more channels."""
    name = type(program.module(node)).__name__.lower() if node.op == "call_module" else name_of(node)
    if program.is_shared(node) and "dropout" not in name:
        return program.same(node, SHARED)
    rank = len(program.shape(node.args[0]))
    if rank != len(program.shape(node)) or rank < 3 or (name[-2:] in ("1d", "2d", "3d") and rank != int(name[-2]) + 2):
        return None  # without a batch dimension
    argument = node.all_input_nodes[0]
    return program.same(node, FOLDED, {argument: program.folded(argument)})


def concatenate_channels(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (K, N, C, *) to (N, K·(C + C + ...), *), head-major."""
    return torch.cat([part.transpose(0, 1) for part in parts], 2).flatten(1, 2)
