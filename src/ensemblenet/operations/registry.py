"""The one table of operations: all that is known of a layer type, of a function and of an ATen operator, by its name.

Add a class of your own with [`ensemblenet.operations.register`][]; one file is all that a new layer type takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx, nn

from ensemblenet.operations.coupling import Axes, Event, LayerSizes, Narrowed, Sizes
from ensemblenet.operations.fusion import Dimensions, Program, Value, fuse_along

__all__ = ["AlongOperation", "Operation", "fusing_operation", "operation_named", "operation_of", "register"]


class Operation:
    """What is known of an operation; a class of its own overrides what it knows better.

    Each method speaks of one of the names that the class is registered for: layers of a type (`narrow`, `reset`,
    `tie`), functions and methods in a graph (`renumber`), ATen operators (`couple`, `work`); `fuse` and `couple_whole`
    serve layers and functions. Without a method, a conversion keeps the sizes around the operation, and fused heads
    run it by `torch.vmap` or one head after another: that costs width or time, never correctness.

    Attributes:
        is_whole: whether a trace calls a layer of this type, or of one that derives from it, as one node; else it
            opens the layer and finds what it calls.

    Example:
        A layer with a number of its own that narrowing must mend, and a way to run it for all heads at once:

        >>> class Shifted(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.width, self.shift = width, nn.Parameter(torch.ones(width))
        ...     def forward(self, x):
        ...         assert x.shape[1] == self.width
        ...         return x + self.shift
        >>> @register(Shifted)
        ... class ShiftedOperation(Operation):
        ...     def narrow(self, layer, base, sizes):
        ...         layer.width = sizes.input[1]
        ...     def fuse(self, program, node):
        ...         shift = program.method("unsqueeze", program.parameter(node, "shift"), 1)
        ...         return Value(program.call(torch.add, program.first(node.args[0]), shift), FIRST)

        >>> from ensemblenet import convert
        >>> from ensemblenet.operations import FIRST, Value
        >>> base = nn.Sequential(nn.Linear(8, 64), Shifted(64), nn.ReLU(), nn.Linear(64, 3))
        >>> convert(base, torch.randn(4, 8), budget=0.9, split_at="input").heads[0].get_submodule("1").width < 64
        True
    """

    is_whole = True

    def couple(self, sizes: Sizes, event: Event) -> None:
        """State which axes of an ATen call's inputs are equal, and give those of its outputs.

        Raises:
            NotImplementedError: nothing is known of this call, so it keeps the sizes of all that it touches.
        """
        raise NotImplementedError

    def work(self, sizes: Sizes, event: Event) -> Axes:
        """The axes whose sizes multiply to an ATen call's MACs; none if they stay."""
        return []

    def couple_whole(self, sizes: Sizes, node: fx.Node, layer: Any) -> Axes | None:
        """Do what `couple` and `work` do, for all ATen calls of a layer or of a function at once.

        Args:
            sizes: the equations.
            node: the call.
            layer: what it calls; None for a function or a method.

        Returns:
            The axes whose sizes multiply to its MACs; None if its ATen calls speak for themselves.

        Raises:
            NotImplementedError: nothing is known of this call, so it keeps the sizes of all that it touches.
        """
        return None

    def tie(self, sizes: Sizes, node: fx.Node, layer: Any) -> None:
        """State what a layer of this type asks of its sizes beyond what its ATen calls do."""

    def renumber(self, narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
        """Mend the numbers that name sizes, such as those of a reshape, in the copy of a node of the base."""

    def narrow(self, layer: Any, base: Any, sizes: LayerSizes) -> None:
        """Mend a layer's own numbers, such as `groups`.

        Args:
            layer: the narrowed layer, whose parameters and buffers have their new shapes.
            base: the layer of the base.
            sizes: around the narrowed layer.
        """

    def reset(self, layer: Any, generator: torch.Generator) -> None:
        """Give a layer of a fresh part what drawing its weights anew does not: such as statistics of no data."""

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        """Write a node of the first head for all heads; None where this does not apply.

        For a layer it serves the types that derive from the registered one too, as long as they keep its `forward`.
        """
        return None


class AlongOperation(Operation):
    """A function of named dimensions; fused, these lie behind the heads.

    Attributes:
        dimensions: which arguments of which function are dimensions; others run in the general way.
    """

    dimensions: ClassVar[Dimensions] = {}

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        """Write the function with the heads as one more dimension in front."""
        return fuse_along(program, node, self.dimensions)


_OPERATIONS: dict[type[nn.Module] | str, Operation] = {}
_Kind = TypeVar("_Kind", bound=Operation)


def register(*names: type[nn.Module] | str) -> Callable[[type[_Kind]], type[_Kind]]:
    """Register a class for layer types and names; a later one takes an earlier one's place.

    Args:
        names: layer types; types of other libraries by name ("timm.LayerNorm2d"), so that they need not be installed;
            functions and methods of tensors ("softmax", "__add__"); ATen operators without namespace and overload.

    Example:
        >>> @register("my_operator")
        ... class MyOperator(Operation):
        ...     def couple(self, sizes, event):
        ...         sizes.set(event.out, list(sizes.axes(event.args[0])))
        >>> type(operation_named("my_operator")).__name__
        'MyOperator'
    """

    def add(kind: type[_Kind]) -> type[_Kind]:
        operation = kind()
        for name in names:
            _OPERATIONS[name] = operation
        return kind

    return add


def operation_of(kind: type[nn.Module], but: Operation | None = None) -> Operation:
    """The operation of a layer type, or of the nearest type that it derives from and that has one.

    Args:
        kind: the layer type.
        but: an operation to pass over.

    Example:
        >>> type(operation_of(nn.GRU)).__name__, operation_of(nn.ModuleList).is_whole
        ('Recurrent', False)
    """
    return _registered(kind, but)[0]


def fusing_operation(layer: nn.Module) -> Operation | None:
    """The operation that can write such layers for all heads: it says how, and the layer has the type's `forward`.

    Example:
        >>> fusing_operation(nn.Linear(2, 2)) is operation_of(nn.Linear), fusing_operation(nn.LSTM(2, 2))
        (True, None)
    """
    operation, kind = _registered(type(layer))
    fuses = type(operation).fuse is not Operation.fuse and kind.forward is type(layer).forward
    return operation if fuses else None


def operation_named(name: str) -> Operation | None:
    """The operation of a function, a method or an ATen operator; None where there is none.

    Example:
        >>> type(operation_named("view")).__name__
        'Reshape'
    """
    return _OPERATIONS.get(name)


class _Unknown(Operation):
    """A layer type that nothing is known of."""

    is_whole = False


_UNKNOWN = _Unknown()


def _registered(kind: type[nn.Module], but: Operation | None = None) -> tuple[Operation, type[nn.Module]]:
    for base in kind.__mro__:
        library = base.__module__.partition(".")[0]
        for name in (base, f"{library}.{base.__name__}", f"*.{base.__name__}"):
            operation = _OPERATIONS.get(name)
            if operation is not None and operation is not but:
                return operation, base
    return _UNKNOWN, nn.Module
