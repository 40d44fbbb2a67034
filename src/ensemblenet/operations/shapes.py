"""What gives tensors other dimensions: reshaping, moving, repeating, joining and cutting them; in one
file, since they share how sizes are renumbered.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import fx, nn

from ensemblenet.operations.axes import Axis, concatenated, free, kept, multiplied, unify
from ensemblenet.operations.coupling import (
    Axes,
    Event,
    LayerSizes,
    Narrowed,
    Sizes,
    argument,
    name_of,
    new_size,
    new_sizes,
    set_argument,
)
from ensemblenet.operations.fusion import (
    FIRST,
    FOLDED,
    SHARED,
    Dimensions,
    Program,
    Value,
    aligned_value,
    arguments_of,
    behind_heads,
    concatenate_channels,
    fuse_along,
)
from ensemblenet.operations.registry import AlongOperation, Operation, register

__all__ = ["Concatenation", "Reshape", "Split", "Unflatten"]


class _OfShape(Operation):
    """Functions whose arguments are a shape, behind those of other kinds."""

    num_others = 1

    def renumber(self, narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
        (axes,) = narrowed.outputs(node)
        self.renumber_shape(narrowed, axes, copy)

    def renumber_shape(self, narrowed: Narrowed, axes: Axes, copy: fx.Node) -> None:
        """Put new sizes in the place of a shape."""
        for key in ("shape", "size"):
            if isinstance(copy.kwargs.get(key), (tuple, list)):
                copy.update_kwarg(key, new_sizes(narrowed, axes, copy.kwargs[key], copy))  # type: ignore[arg-type]
                return
        others, given = copy.args[: self.num_others], copy.args[self.num_others :]
        if given and isinstance(given[0], (tuple, list)):
            copy.args = (*others, new_sizes(narrowed, axes, given[0], copy), *given[1:])
        elif given and not hasattr(given[0], "is_floating_point"):
            copy.args = (*others, *new_sizes(narrowed, axes, given, copy))

    def given_axes(self, sizes: Sizes, node: fx.Node, shape: Sequence[int]) -> Axes:
        """The axes of a shape in a call: free where the code writes a number, else what the code reads it from."""
        given = node.kwargs.get("size") or node.kwargs.get("shape") or node.args[self.num_others :]
        if isinstance(given, tuple) and given and isinstance(given[0], (tuple, list)):
            (given, *_) = given
        if not isinstance(given, (tuple, list)) or len(given) != len(shape):
            return [kept(size) for size in shape]
        return [_given_axis(sizes, number, size) for number, size in zip(given, shape, strict=True)]


def _given_axis(sizes: Sizes, given: Any, size: int) -> Axis:
    if not isinstance(given, fx.Node):
        return free(size)
    if given.target == "size" and isinstance(source := given.args[0], fx.Node) and len(given.args) == 2:
        return sizes.value(source)[given.args[1]]  # type: ignore[index]
    return kept(size)


class _New(_OfShape):
    def couple(self, sizes: Sizes, event: Event) -> None:
        """A tensor that the network makes; what is made inside of another function keeps its sizes."""
        if name_of(event.node) != event.name:
            raise NotImplementedError
        sizes.set(event.out, self.given_axes(sizes, event.node, event.out.shape))


@register("zeros", "ones", "empty", "full", "rand", "randn")
class New(_New):
    """New tensors of a shape."""

    num_others = 0


@register("new_zeros", "new_ones", "new_empty", "new_full")
class NewLike(_New):
    """New tensors of a shape, and of the dtype and device of another."""


def _given_sizes(program: Program, node: fx.Node) -> list[Any] | None:
    """The numbers that follow the tensor, as one argument or as several; None where the call is of another form."""
    first, *sizes = node.args
    if node.kwargs or not isinstance(first, fx.Node) or program.value(first).layout is SHARED:
        return None
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    if not sizes or isinstance(sizes[0], torch.dtype):
        return None
    return [program.value(size).node for size in sizes]


def _couple_reshape(sizes: Sizes, event: Event) -> None:
    """Dimensions are multiplied and cut, in order."""
    sizes.set(event.out, _reshape(sizes.axes(event.args[0]), event.out.shape))


@register("view", "reshape", "_unsafe_view", "_reshape_alias", "view_copy")
class Reshape(_OfShape):
    """The same numbers in another shape."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        _couple_reshape(sizes, event)

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        if program.is_shared(node):
            return program.same(node, SHARED)
        sizes = _given_sizes(program, node)
        if sizes is None:
            return None
        return Value(program.method("reshape", program.first(node.args[0]), program.num_heads, *sizes), FIRST)


def _reshape(before: Axes, shape: Sequence[int]) -> Axes:
    """Match runs of old dimensions with runs of new ones of the same product."""
    after = [free(size) for size in shape]
    i = j = 0
    while i < len(before) or j < len(after):
        olds, news = [], []
        old_size = new_size = 1
        while not olds or not news or old_size != new_size:
            if j < len(after) and (old_size > new_size or (olds and not news) or i == len(before)):
                news.append(j)
                new_size *= after[j].size
                j += 1
            elif i < len(before):
                olds.append(before[i])
                old_size *= before[i].size
                i += 1
            else:
                break
        if len(news) == 1:
            after[news[0]] = multiplied(olds)
        elif news:
            unify(multiplied(olds), multiplied([after[k] for k in news]))
    return after


@register("squeeze", "unsqueeze", "squeeze_copy")
class Squeeze(AlongOperation):
    """Dimensions of one come or go."""

    dimensions: ClassVar[Dimensions] = dict.fromkeys(("squeeze", "unsqueeze"), ((1, "dim", None),))

    def couple(self, sizes: Sizes, event: Event) -> None:
        _couple_reshape(sizes, event)


@register("flatten", nn.Flatten)
class Flatten(Operation):
    """Neighbouring dimensions become one."""

    is_whole = False

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        if node.op != "call_module":
            return fuse_along(program, node, {"flatten": ((1, "start_dim", 0), (2, "end_dim", -1))})
        if program.is_shared(node):
            return program.same(node, SHARED)
        layer = program.module(node)
        dims = behind_heads((layer.start_dim, layer.end_dim))
        return Value(program.call(torch.flatten, program.first(node.args[0]), *dims), FIRST)


@register("unflatten", nn.Unflatten)
class Unflatten(Operation):
    """A dimension becomes several."""

    is_whole = False

    def renumber(self, narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
        (axes,) = narrowed.outputs(node)
        dim, sizes = argument(copy, 1, "dim"), argument(copy, 2, "sizes")
        first = dim % len(narrowed.axes(node.all_input_nodes[0]))
        set_argument(copy, 2, "sizes", new_sizes(narrowed, axes[first : first + len(sizes)], sizes, copy))

    def narrow(self, layer: nn.Unflatten, base: nn.Unflatten, sizes: LayerSizes) -> None:
        rank = len(sizes.input)
        dim = layer.dim % rank if isinstance(layer.dim, int) else rank - 1
        layer.unflattened_size = sizes.output[dim : dim + len(layer.unflattened_size)]

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        if node.op != "call_module":
            return fuse_along(program, node, {"unflatten": ((1, "dim", None),)})
        layer = program.module(node)
        if program.is_shared(node):
            return program.same(node, SHARED)
        if not isinstance(layer.dim, int):
            return None
        x, dim = program.first(node.args[0]), behind_heads(layer.dim)
        return Value(program.method("unflatten", x, dim, layer.unflattened_size), FIRST)


@register("permute")
class Permute(Operation):
    """(d0, d1, ...) in another order."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        before = sizes.axes(event.args[0])
        sizes.set(event.out, [before[dim] for dim in event.args[1]])

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        if program.is_shared(node):
            return program.same(node, SHARED)
        dims = _given_sizes(program, node)
        if dims is None:
            return None
        rank = len(program.shape(node.args[0]))
        return Value(program.method("permute", program.first(node.args[0]), 0, *(d % rank + 1 for d in dims)), FIRST)


_TRANSPOSES: Dimensions = dict.fromkeys(
    ("transpose", "swapaxes", "swapdims"), ((1, "dim0", None), (2, "dim1", None))
) | {"movedim": ((1, "source", None), (2, "destination", None))}


@register(*_TRANSPOSES, "t", "transpose_copy")
class Transpose(AlongOperation):
    """Two dimensions change places."""

    dimensions: ClassVar[Dimensions] = _TRANSPOSES

    def couple(self, sizes: Sizes, event: Event) -> None:
        axes = list(sizes.axes(event.args[0]))
        if len(axes) > 1:
            a, b = event.args[1:3] if len(event.args) > 2 else (0, 1)
            axes[a], axes[b] = axes[b], axes[a]
        if event.name.endswith("_"):  # in place: the tensor's own dimensions change
            sizes.reorder(event.out, axes)
        else:
            sizes.set(event.out, axes)


@register("broadcast_to")
class Broadcast(_OfShape):
    """Sizes of one become larger."""


@register("expand")
class Expand(_OfShape):
    """Sizes of one become larger."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        """What sizes of one become is free only where the network's code writes a number."""
        shape = event.out.shape
        before = _with_ones(sizes.axes(event.args[0]), len(shape))
        new = [kept(size) for size in shape]
        if name_of(event.node) == "expand":
            new = self.given_axes(sizes, event.node, shape)
        elif name_of(event.node) == "expand_as":
            new = sizes.value(argument(event.node, 1, "other"))
        sizes.set(event.out, [old if old.size == axis.size else axis for old, axis in zip(before, new, strict=True)])

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        return _fuse_repeat(program, node, -1)


def _with_ones(axes: Axes, rank: int) -> Axes:
    return [kept(1)] * (rank - len(axes)) + axes


def _fuse_repeat(program: Program, node: fx.Node, of_heads: int) -> Value | None:
    if program.is_shared(node):
        return program.same(node, SHARED)
    sizes = _given_sizes(program, node)
    if sizes is None:
        return None
    assert isinstance(node.args[0], fx.Node)
    x = aligned_value(program, node.args[0], len(sizes))
    return Value(program.method(name_of(node), x, of_heads, *sizes), FIRST)


@register("repeat")
class Repeat(_OfShape):
    """Each dimension a number of times; a size of one becomes that number, as in `expand`."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        times = event.args[1]
        before = _with_ones(sizes.axes(event.args[0]), len(times))
        new = self.given_axes(sizes, event.node, times)
        axes = [
            given if axis.size == 1 else multiplied([kept(n), axis])
            for n, given, axis in zip(times, new, before, strict=True)
        ]
        sizes.set(event.out, axes)

    def renumber(self, narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
        (after,) = narrowed.outputs(node)
        before = _with_ones(narrowed.axes(node.all_input_nodes[0]), len(after))
        times = [new if old.size == 1 else kept(new.size // old.size) for old, new in zip(before, after, strict=True)]
        self.renumber_shape(narrowed, times, copy)

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        return _fuse_repeat(program, node, 1)


@register("cat", "concat", "concatenate")
class Concatenation(Operation):
    """Tensors side by side along a dimension."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        parts = [sizes.axes(ref) for ref in event.args[0]]
        dim = event.argument(1, "dim", 0) % len(parts[0])
        axes = list(parts[0])
        for other in parts[1:]:
            for d, axis in enumerate(other):
                if d != dim:
                    unify(axes[d], axis)
        axes[dim] = concatenated(part[dim] for part in parts)
        sizes.set(event.out, axes)

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        tensors, dim = arguments_of(node, tensors=None, dim=0)
        if program.is_shared(node):
            return program.same(node, SHARED)
        rank = len(program.shape(node))
        # an empty vector is passed over whatever the others are, but has its say in the dtype; it stays a vector
        skipped = [tensor for tensor in tensors if program.shape(tensor) == (0,) and rank > 1]
        parts = [_of_first_head(program, part) if part in skipped else program.first(part) for part in tensors]
        folded = any(program.value(tensor).layout is FOLDED for tensor in tensors)
        if folded and dim % rank == 1 and not skipped:
            return Value(program.call(concatenate_channels, parts), FOLDED)
        return Value(program.call(node.target, parts, behind_heads(dim)), FIRST)  # type: ignore[arg-type]


def _of_first_head(program: Program, tensor: fx.Node) -> fx.Node:
    value = program.value(tensor)
    return value.node if value.layout is SHARED else program.call(operator.getitem, program.first(tensor), 0)


@register("stack")
class Stacking(Operation):
    """Tensors along a new dimension."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        """A new dimension, the others are equal."""
        parts = [sizes.axes(ref) for ref in event.args[0]]
        for other in parts[1:]:
            for left, right in zip(parts[0], other, strict=True):
                unify(left, right)
        dim = event.args[1] if len(event.args) > 1 else 0
        axes = list(parts[0])
        axes.insert(dim % (len(axes) + 1), kept(len(parts)))
        sizes.set(event.out, axes)

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        tensors, dim = arguments_of(node, tensors=None, dim=0)
        if program.is_shared(node):
            return program.same(node, SHARED)
        parts = [program.first(tensor) for tensor in tensors]
        return Value(program.call(node.target, parts, behind_heads(dim)), FIRST)  # type: ignore[arg-type]


@register("chunk", "unsafe_split", "unsafe_chunk")
class Chunk(AlongOperation):
    """A dimension in segments."""

    dimensions: ClassVar[Dimensions] = dict.fromkeys(("chunk", "split", "split_with_sizes"), ((2, "dim", 0),))

    def couple(self, sizes: Sizes, event: Event) -> None:
        """Equal segments stay equal, as whoever asks for equal segments expects."""
        before = sizes.axes(event.args[0])
        dim = event.argument(2, "dim", 0) % len(before)
        if len(event.out) == 1:
            return sizes.set(event.out[0], list(before))
        by_size: dict[int, Axis] = {}
        parts = [by_size.setdefault(out.shape[dim], free(out.shape[dim])) for out in event.out]
        unify(before[dim], concatenated(parts))
        for out, part in zip(event.out, parts, strict=True):
            sizes.set(out, [*before[:dim], part, *before[dim + 1 :]])


@register("split", "split_with_sizes")
class Split(Chunk):
    """A dimension in segments of given sizes."""

    def renumber(self, narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
        outputs = narrowed.outputs(node)
        key = next((key for key in ("split_size_or_sections", "split_size", "split_sizes") if key in copy.kwargs), "")
        dim = argument(copy, 2, "dim", 0)
        old = argument(copy, 1, key)
        axes = [axes[dim] for axes in outputs]
        if isinstance(old, (tuple, list)):
            set_argument(copy, 1, key, new_sizes(narrowed, axes, old, copy))
        else:
            set_argument(copy, 1, key, new_size(narrowed, axes[0], old, copy))
