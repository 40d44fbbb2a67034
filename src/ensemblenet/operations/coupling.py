"""How the author of an operation's class sees a network whose sizes are solved, and one that is narrowed.

Shapes: N examples, C channels, D features of an attention head, * any dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import fx

from ensemblenet.operations.axes import Axis
from ensemblenet.work import Traffic

__all__ = ["Axes", "Event", "LayerSizes", "Narrowed", "Sizes", "TensorRef", "name_of", "refs"]

Axes = list[Axis]


class TensorRef(NamedTuple):
    """A tensor as an event names it; `source` is the name of the parameter or buffer that it is, if any.

    Example:
        >>> TensorRef(id=0, shape=(64, 8), source="0.weight").shape
        (64, 8)
    """

    id: int
    shape: tuple[int, ...]
    source: str | None


class Event(NamedTuple):
    """One ATen call, with every tensor replaced by its `TensorRef`.

    Example:
        >>> import torch
        >>> from ensemblenet.conversion.trace import trace
        >>> [(event.name, event.out.shape) for event in trace(torch.nn.Conv2d(3, 8, 3), torch.zeros(2, 3, 6, 6)).events]
        [('convolution', (2, 8, 4, 4))]
    """

    node: fx.Node
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    macs: float  # multiply-adds, as torch.utils.flop_counter counts them, halved
    traffic: Traffic = Traffic()  # the tensors that it moves through memory

    @property
    def name(self) -> str:
        """The operator's name, without namespace and overload."""
        return self.op._schema.name.split("::")[-1]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, given by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


def refs(value: Any) -> list[TensorRef]:
    """All tensors in what an event holds.

    Example:
        >>> tensor = TensorRef(0, (4, 8), None)
        >>> refs(([tensor, 3], {"dim": tensor})) == [tensor, tensor]
        True
    """
    if isinstance(value, TensorRef):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [ref for part in value for ref in refs(part)]


class Sizes(Protocol):
    """The axes of all tensors, while it is being stated which of them are one.

    Example:
        A linear layer whose outputs are never narrowed:

        >>> import torch
        >>> from torch import nn
        >>> from ensemblenet import convert
        >>> from ensemblenet.operations import linear, register
        >>> class Wide(nn.Linear): ...
        >>> @register(Wide)
        ... class WideOperation(linear.Linear):
        ...     def tie(self, sizes, node, layer):
        ...         sizes.value(node)[-1].keep()

        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), Wide(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> convert(base, torch.randn(4, 8), budget=0.9, split_at="input").heads[0].get_submodule("2").out_features
        64
    """

    def axes(self, ref: TensorRef) -> Axes:
        """The axes of a tensor; a parameter's are unknown at first, any other constant keeps its sizes."""
        ...

    def set(self, out: TensorRef | fx.Node, axes: Axes) -> None:
        """Give the axes of an output; one that was written in place has them already, and they are unified."""
        ...

    def reorder(self, out: TensorRef, axes: Axes) -> None:
        """Give a tensor whose dimensions were moved in place its axes in their new order."""
        ...

    def keep(self, value: Any) -> None:
        """Keep all sizes of all tensors in a value."""
        ...

    def rows(self, ref: TensorRef) -> None:
        """State that a buffer, such as a fixed kernel of each channel, may lose some of its rows."""
        ...

    def vector(self, ref: TensorRef | None, axis: Axis) -> None:
        """State that a vector of parameters or statistics has one entry for each position of an axis."""
        ...

    def weight(self, ref: TensorRef, contracted: Axes, written: Axis | None = None) -> None:
        """Note that a tensor multiplies features, if it is a parameter.

        Args:
            ref: the tensor.
            contracted: the axes that it sums over, its fan-in.
            written: the axis of the features that come out.
        """
        ...

    def bias(self, ref: TensorRef) -> None:
        """Note that a tensor is added to features, if it is a parameter."""
        ...

    def scale(self, ref: TensorRef | None) -> None:
        """Note that a tensor multiplies each channel by a number of its own, if it is a vector of parameters."""
        ...

    def is_weight(self, ref: TensorRef) -> bool:
        """Whether a tensor is a parameter, perhaps reshaped."""
        ...

    def group(self, node: fx.Node, axis: Axis) -> None:
        """Note that a node works in groups (of channels, or attention heads), and the axis that counts them."""
        ...

    def parameter(self, node: fx.Node, name: str) -> Axes:
        """The axes of a parameter of the layer that a node calls."""
        ...

    def parameter_ref(self, node: fx.Node, name: str) -> TensorRef | None:
        """The reference to a parameter or buffer of the layer that a node calls; None where the layer has none."""
        ...

    def value(self, node: fx.Node) -> Axes:
        """The axes of a node's tensor."""
        ...


class Narrowed(Protocol):
    """What has become of the sizes of a node of the base.

    Example:
        A reshape in a network all of whose sizes are halved:

        >>> from ensemblenet.operations.axes import free
        >>> class Halved:
        ...     def size(self, axis):
        ...         return axis.size // 2
        >>> graph = fx.Graph()
        >>> copy = graph.call_method("reshape", (graph.placeholder("x"), -1, 64))
        >>> new_size(Halved(), free(64), 64, copy)
        32
    """

    def axes(self, node: fx.Node) -> Axes:
        """The axes of a node's tensor."""
        ...

    def outputs(self, node: fx.Node) -> list[Axes]:
        """The axes of every tensor that a node gives."""
        ...

    def size(self, axis: Axis) -> int:
        """An axis's new size."""
        ...

    def position(self, axis: Axis, offset: int) -> int | None:
        """Where a position of the base lies now; None if it lies inside a part that is narrowed."""
        ...

    def groups(self, node: fx.Node) -> int | None:
        """How many groups a node works in now; None where nothing was noted."""
        ...


@dataclass(frozen=True)
class LayerSizes:
    """The sizes around a narrowed layer.

    Attributes:
        input: the shape of its first input.
        output: the shape of its output.
        groups: how many groups (of channels, or attention heads) it has now, where it has any.

    Example:
        >>> LayerSizes(input=(2, 48, 8, 8), output=(2, 24, 8, 8), groups=None).output[1]
        24
    """

    input: tuple[int, ...]
    output: tuple[int, ...]
    groups: int | None


# -- for the methods that renumber a graph


def name_of(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node, given by position or by name."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def set_argument(node: fx.Node, position: int, name: str, value: Any) -> None:
    """Put a value in an argument's place."""
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def new_size(narrowed: Narrowed, axis: Axis, old: Any, copy: fx.Node) -> Any:
    """A size argument for an axis: a number is replaced, -1 stays, a computed size is scaled if it is not right."""
    size = narrowed.size(axis)
    if isinstance(old, fx.Node):
        return _scaled(old, size, axis.size, copy)
    return old if size == axis.size or old == -1 else size


def _scaled(old: fx.Node, size: int, base_size: int, copy: fx.Node) -> fx.Node:
    """A computed number, scaled by what it must be and what it is for the traced inputs."""
    value = old.meta.get("narrowed", base_size)
    if value == size:
        return old
    with copy.graph.inserting_before(copy):
        scaled = copy.graph.call_function(operator.mul, (old, size))
        return copy.graph.call_function(operator.floordiv, (scaled, value))


def new_sizes(narrowed: Narrowed, axes: Sequence[Axis], old: Sequence[Any], copy: fx.Node) -> tuple[Any, ...]:
    """Size arguments for several axes; left alone where they are not as many."""
    if len(axes) != len(old):
        return tuple(old)
    return tuple(new_size(narrowed, axis, size, copy) for axis, size in zip(axes, old, strict=True))


def set_groups(narrowed: Narrowed, node: fx.Node, copy: fx.Node, position: int, name: str) -> None:
    """Put a function's new number of groups in its argument's place, where it has groups."""
    groups = narrowed.groups(node)
    if groups is not None:
        old = argument(copy, position, name)
        new = _scaled(old, groups, groups, copy) if isinstance(old, fx.Node) else groups
        set_argument(copy, position, name, new)
