"""What takes parts of tensors, and what reads their sizes."""

from __future__ import annotations

import math
import operator
from typing import Any, ClassVar

from torch import Tensor, fx

from ensemblenet.operations.axes import Axis, concatenated, free, kept, unify
from ensemblenet.operations.coupling import (
    Axes,
    Event,
    Narrowed,
    Sizes,
    argument,
    name_of,
    new_size,
    refs,
    set_argument,
)
from ensemblenet.operations.fusion import (
    FIRST,
    SHARED,
    Dimensions,
    Program,
    Value,
    arguments_of,
    behind_heads,
    rewritten,
)
from ensemblenet.operations.registry import AlongOperation, Operation, register

__all__ = ["Item", "Narrow", "Select"]


@register("slice")
class Slice(Operation):
    """A segment of a dimension."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        before = sizes.axes(event.args[0])
        dim, start, end, step = (*event.args[1:], *(0, None, None, 1)[len(event.args) - 1 :])
        dim, size = (dim or 0) % len(before), before[(dim or 0) % len(before)].size
        begin, stop, _ = slice(start, end).indices(size)
        axes = list(before)
        if step != 1:
            axes[dim].keep()
            axes[dim] = kept(event.out.shape[dim])
        elif stop - begin != size:
            axes[dim] = free(max(stop - begin, 0))
            unify(before[dim], concatenated([free(begin), axes[dim], free(size - stop)]))
        sizes.set(event.out, axes)


@register("narrow")
class Narrow(AlongOperation):
    """A segment of a dimension, by its start and length."""

    dimensions: ClassVar[Dimensions] = {"narrow": ((1, "dim", None),)}

    def renumber(self, narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
        dim, start, length = (argument(copy, k, key) for k, key in ((1, "dim"), (2, "start"), (3, "length")))
        axis = narrowed.axes(node.all_input_nodes[0])[dim]
        if narrowed.size(axis) == axis.size or not isinstance(start, int):
            return
        (axes,) = narrowed.outputs(node)
        set_argument(copy, 2, "start", narrowed.position(axis, start % axis.size))
        set_argument(copy, 3, "length", new_size(narrowed, axes[dim], length, copy))


_SELECTS: Dimensions = dict.fromkeys(("select", "index_select"), ((1, "dim", None),)) | {"unbind": ((1, "dim", 0),)}


@register(*_SELECTS)
class Select(AlongOperation):
    """Positions of a dimension, which keeps its size."""

    dimensions: ClassVar[Dimensions] = _SELECTS

    def couple(self, sizes: Sizes, event: Event) -> None:
        before = list(sizes.axes(event.args[0]))
        dim = (event.args[1] if len(event.args) > 1 else 0) % len(before)
        before[dim].keep()
        for out in refs(event.out):
            same_rank = len(out.shape) == len(before)
            sizes.set(out, [*before[:dim], *([kept(out.shape[dim])] if same_rank else []), *before[dim + 1 :]])


@register("index", "_unsafe_index")
class Lookup(Operation):
    """Positions that tensors name."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        before = sizes.axes(event.args[0])
        lookups = list(event.args[1]) + [None] * (len(before) - len(event.args[1]))
        looked_up = [dim for dim, lookup in enumerate(lookups) if lookup is not None]
        if any(lookups[dim].shape and math.prod(lookups[dim].shape) == 0 for dim in looked_up):
            raise NotImplementedError
        sizes.keep([lookup for lookup in lookups if lookup is not None])
        for dim in looked_up:
            before[dim].keep()
        rank = len(event.out.shape) - (len(before) - len(looked_up))
        adjacent = looked_up == list(range(looked_up[0], looked_up[-1] + 1))
        position = looked_up[0] if adjacent else 0
        rest = [axis for dim, axis in enumerate(before) if dim not in looked_up]
        new = [kept(size) for size in event.out.shape[position : position + rank]]
        sizes.set(event.out, [*rest[:position], *new, *rest[position:]])


@register("take_along_dim", "gather", "scatter", "scatter_add", "index_add", "index_copy")
class Along(Operation):
    """Positions of one dimension that a tensor names, read or written; the other dimensions meet their like."""

    def couple_whole(self, sizes: Sizes, node: fx.Node, layer: None) -> Axes | None:
        """`take_along_dim` alone repeats its indices along the other dimensions."""
        if name_of(node) != "take_along_dim":
            return None
        axes, indices = list(sizes.value(argument(node, 0, "input"))), sizes.value(argument(node, 1, "indices"))
        dim = argument(node, 2, "dim")
        if dim is None:
            raise NotImplementedError
        axes[dim].keep()
        for own, axis in zip(indices, axes, strict=True):
            if own.size != 1 and axis is not axes[dim]:
                unify(own, axis)
        axes[dim] = indices[dim]
        sizes.set(node, axes)
        return []

    def couple(self, sizes: Sizes, event: Event) -> None:
        dim = event.args[1] % len(event.args[0].shape)
        for ref in refs(event.args):
            sizes.axes(ref)[dim if len(ref.shape) == len(event.args[0].shape) else 0].keep()
        before = sizes.axes(event.args[0])
        for ref in refs(event.args)[1:]:
            if len(ref.shape) == len(before):
                for d, (own, axis) in enumerate(zip(sizes.axes(ref), before, strict=True)):
                    if d != dim:
                        unify(own, axis)
        sizes.set(event.out, list(sizes.axes(event.args[2] if event.name == "gather" else event.args[0])))


@register("index_put")
class Put(Operation):
    """`x[positions] = y`, positions being tensors, or a mask, for the first dimensions."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        before, values = sizes.axes(event.args[0]), sizes.axes(event.args[2])
        lookups = event.args[1]
        if any(lookup is None for lookup in lookups):
            raise NotImplementedError
        sizes.keep(lookups)
        taken, shape = 0, event.args[0].shape
        for lookup in lookups:
            is_mask = lookup.shape == shape[taken : taken + len(lookup.shape)]
            taken += max(len(lookup.shape), 1) if is_mask else 1
        for axis in before[:taken]:
            axis.keep()
        for d in range(1, len(before) - taken + 1):
            if len(values) >= d and values[-d].size != 1:
                unify(values[-d], before[-d])
        sizes.set(event.out, before)


@register("unfold")
class Windows(Operation):
    """`x.unfold(dim, size, step)`: a dimension in windows, which become the last one."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        axes = list(sizes.axes(event.args[0]))
        dim = event.args[1] % len(axes)
        axes[dim].keep()
        axes[dim] = kept(event.out.shape[dim])
        sizes.set(event.out, [*axes, kept(event.out.shape[-1])])


@register("getitem", "__getitem__")
class Item(Operation):
    """`x[...]`, of a tensor or of a tuple."""

    def renumber(self, narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
        source, index = node.args[0], copy.args[1]
        if node.target is not operator.getitem or not isinstance(source, fx.Node):
            return
        if isinstance(index, int) and len(narrowed.outputs(source)) > 1:
            return
        axes = narrowed.axes(source)
        if axes:
            items = index if isinstance(index, tuple) else (index,)
            new = tuple(_slice(narrowed, axis, item) for axis, item in zip(_addressed(axes, items), items, strict=True))
            copy.update_arg(1, new if isinstance(index, tuple) else new[0])

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        source, index = node.args
        value = program.value(source)
        if not program.is_tensor(source):  # of a tuple
            return program.same(node, value.layout)
        items = index if isinstance(index, tuple) else (index,)
        tensors = [
            item
            for item in items
            if isinstance(item, (list, Tensor)) or (isinstance(item, fx.Node) and program.is_tensor(item))
        ]
        if program.is_shared(node):
            return program.same(node, SHARED)
        if value.layout is SHARED or len(tensors) > 1:
            return None
        if any(isinstance(item, fx.Node) and program.value(item).layout is not SHARED for item in tensors):
            return None
        return rewritten(program, node, (source, (slice(None), *items)), {})


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


@register("setitem", "__setitem__")
class SetItem(Operation):
    """`x[...] = y`."""

    def fuse(self, program: Program, node: fx.Node) -> None:
        """From here on every head has a tensor of its own; the rest is done for one head after another."""
        target = node.all_input_nodes[0]
        if not program.is_shared(node) and program.value(target).layout is SHARED:
            program.set_value(target, Value(program.method("contiguous", program.first(target)), FIRST))


@register("size")
class Size(Operation):
    """`x.size()`."""

    def fuse(self, program: Program, node: fx.Node) -> Value:
        tensor, dim = arguments_of(node, input=None, dim=None)
        if program.is_shared(node):
            return program.same(node, SHARED)
        sizes = program.method("size", program.first(tensor))
        index = slice(1, None) if dim is None else behind_heads(dim)
        return Value(program.call(operator.getitem, sizes, index), SHARED)


@register("getattr")
class Attribute(Operation):
    """`x.shape`, `x.device`, `x.dtype`."""

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        tensor, name = node.args
        value = program.value(tensor)
        if value.layout is SHARED or name in ("device", "dtype"):
            return program.same(node, SHARED)
        if name == "shape":
            sizes = program.method("size", program.first(tensor))
            return Value(program.call(operator.getitem, sizes, slice(1, None)), SHARED)
        return None
