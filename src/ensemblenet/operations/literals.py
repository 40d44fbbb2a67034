"""Numbers in a graph that name sizes, such as those of a reshape, become the narrowed ones.

A graph computes with the base's sizes; here they meet tensors whose sizes have changed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import fx

from ensemblenet.operations.axes import Axis

__all__ = ["Narrowed", "translate"]


class Narrowed(Protocol):
    """What is known of a node of the base after narrowing."""

    def outputs(self, node: fx.Node) -> list[list[Axis]]:
        """The axes of every tensor that a node gives."""
        ...

    def axes(self, node: fx.Node) -> list[Axis]:
        """The axes of a node's tensor."""
        ...

    def size(self, axis: Axis) -> int:
        """An axis's new size."""
        ...

    def groups(self, node: fx.Node) -> int | None:
        """The new number of groups of a node."""
        ...

    def position(self, axis: Axis, offset: int) -> int | None:
        """Where a position of the base lies now."""
        ...


def translate(narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
    """Mend the numbers in the copy of a node of the base."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    rule = _RULES.get(name)
    if rule is not None and node.op in ("call_method", "call_function"):
        rule(narrowed, node, copy)


_Rule = Callable[[Narrowed, fx.Node, fx.Node], None]
_RULES: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(function: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _new_size(narrowed: Narrowed, axis: Axis, old: Any, copy: fx.Node) -> Any:
    """A size argument for an axis: a number is replaced, a computed size is scaled, -1 stays."""
    size = narrowed.size(axis)
    if size == axis.size or (isinstance(old, int) and old == -1):
        return old
    if isinstance(old, fx.Node):
        with copy.graph.inserting_before(copy):
            scaled = copy.graph.call_function(operator.mul, (old, size))
            return copy.graph.call_function(operator.floordiv, (scaled, axis.size))
    return size


def _new_sizes(narrowed: Narrowed, axes: Sequence[Axis], old: Sequence[Any], copy: fx.Node) -> tuple[Any, ...]:
    if len(axes) != len(old):
        return tuple(old)
    return tuple(_new_size(narrowed, axis, size, copy) for axis, size in zip(axes, old, strict=True))


@_rule("view", "reshape", "expand", "broadcast_to")
def _shape(narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
    (axes,) = narrowed.outputs(node)
    for key in ("shape", "size"):
        if isinstance(copy.kwargs.get(key), (tuple, list)):
            copy.update_kwarg(key, _new_sizes(narrowed, axes, copy.kwargs[key], copy))  # type: ignore[arg-type]
            return
    if isinstance(copy.args[1], (tuple, list)):
        copy.update_arg(1, _new_sizes(narrowed, axes, copy.args[1], copy))
    elif not hasattr(copy.args[1], "is_floating_point"):
        copy.args = (copy.args[0], *_new_sizes(narrowed, axes, copy.args[1:], copy))


@_rule("unflatten")
def _unflatten(narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
    (axes,) = narrowed.outputs(node)
    dim, sizes = _argument(copy, 1, "dim"), _argument(copy, 2, "sizes")
    first = dim % len(narrowed.axes(node.all_input_nodes[0]))
    _set_argument(copy, 2, "sizes", _new_sizes(narrowed, axes[first : first + len(sizes)], sizes, copy))


@_rule("split", "split_with_sizes")
def _split(narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
    outputs = narrowed.outputs(node)
    key = next((key for key in ("split_size_or_sections", "split_size", "split_sizes") if key in copy.kwargs), "")
    dim = _argument(copy, 2, "dim", 0)
    old = _argument(copy, 1, key)
    axes = [axes[dim] for axes in outputs]
    if isinstance(old, (tuple, list)):
        _set_argument(copy, 1, key, _new_sizes(narrowed, axes, old, copy))
    else:
        _set_argument(copy, 1, key, _new_size(narrowed, axes[0], old, copy))


@_rule("narrow")
def _narrow(narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
    dim, start, length = (_argument(copy, k, key) for k, key in ((1, "dim"), (2, "start"), (3, "length")))
    axis = narrowed.axes(node.all_input_nodes[0])[dim]
    if narrowed.size(axis) == axis.size or not isinstance(start, int):
        return
    (axes,) = narrowed.outputs(node)
    _set_argument(copy, 2, "start", narrowed.position(axis, start % axis.size))
    _set_argument(copy, 3, "length", _new_size(narrowed, axes[dim], length, copy))


@_rule("getitem")
def _getitem(narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
    source = node.args[0]
    index = copy.args[1]
    if not isinstance(source, fx.Node) or (isinstance(index, int) and len(narrowed.outputs(source)) > 1):
        return
    axes = narrowed.axes(source)
    if axes:
        items = index if isinstance(index, tuple) else (index,)
        new = tuple(_slice(narrowed, axis, item) for axis, item in zip(_addressed(axes, items), items, strict=True))
        copy.update_arg(1, new if isinstance(index, tuple) else new[0])


def _addressed(axes: list[Axis], items: tuple[Any, ...]) -> list[Axis | None]:
    """The axis that each item of an index speaks of."""
    takes = [0 if item is None or item is Ellipsis else 1 for item in items]
    addressed: list[Axis | None] = []
    dim = 0
    for item, take in zip(items, takes, strict=True):
        if item is Ellipsis:
            dim = len(axes) - sum(takes[len(addressed) + 1 :])
            addressed.append(None)
        else:
            addressed.append(axes[dim] if take else None)
            dim += take
    return addressed


def _slice(narrowed: Narrowed, axis: Axis | None, item: Any) -> Any:
    if axis is None or not isinstance(item, slice) or narrowed.size(axis) == axis.size:
        return item

    def bound(value: Any) -> Any:
        if not isinstance(value, int):
            return value
        return narrowed.position(axis, min(value + axis.size if value < 0 else value, axis.size))

    return slice(bound(item.start), bound(item.stop), item.step)


@_rule("layer_norm", "rms_norm")
def _layer_norm(narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
    (axes,) = narrowed.outputs(node)
    old = _argument(copy, 1, "normalized_shape")
    if isinstance(old, (tuple, list)):
        _set_argument(copy, 1, "normalized_shape", _new_sizes(narrowed, axes[-len(old) :], old, copy))


@_rule("group_norm")
def _group_norm(narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
    groups = narrowed.groups(node)
    if groups is not None:
        _set_argument(copy, 1, "num_groups", groups)


@_rule("conv1d", "conv2d", "conv3d")
def _convolution(narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
    groups = narrowed.groups(node)
    if groups is not None:
        _set_argument(copy, 6, "groups", groups)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _set_argument(node: fx.Node, position: int, name: str, value: Any) -> None:
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
