"""What works along dimensions: sums and means over them, softmax, sums as they go, sorting."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import fx, nn

from ensemblenet.operations.axes import concatenated, free, kept, unify
from ensemblenet.operations.coupling import Axes, Event, Sizes, argument, refs
from ensemblenet.operations.fusion import ALL, FIRST, SHARED, Dimensions, Program, Value, behind_heads, fuse_along
from ensemblenet.operations.pointwise import couple_pointwise
from ensemblenet.operations.registry import AlongOperation, Operation, register

__all__ = ["Along", "Gate", "Reduction"]

_OF_ALL: Dimensions = dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "logsumexp"), ((1, "dim", ALL),))
_OF_ONE: Dimensions = dict.fromkeys(("argmax", "argmin"), ((1, "dim", None),))


@register(
    *_OF_ALL, *_OF_ONE, "var_mean", "std_mean", "max", "min", "prod", "linalg_vector_norm", "norm", "any", "all",
    "median",
)  # fmt: skip
class Reduction(AlongOperation):
    """Sums, means, largest values: some dimensions vanish or become one."""

    dimensions: ClassVar[Dimensions] = {**_OF_ALL, **_OF_ONE}

    def couple(self, sizes: Sizes, event: Event) -> None:
        before = sizes.axes(event.args[0])
        named = [event.kwargs.get("dim"), *event.args[1:3]]
        dims = next((dim for dim in named if isinstance(dim, (list, tuple))), None)
        if dims is None:
            dims = [dim for dim in named if isinstance(dim, int) and not isinstance(dim, bool)][-1:]
        gone = {dim % len(before) for dim in dims} if dims else set(range(len(before)))
        for out in refs(event.out):
            if len(out.shape) == len(before):
                axes = [kept(1) if dim in gone else axis for dim, axis in enumerate(before)]
            else:
                axes = [axis for dim, axis in enumerate(before) if dim not in gone]
            sizes.set(out, axes)


_ALONG: Dimensions = dict.fromkeys(("softmax", "log_softmax", "cumsum"), ((1, "dim", None),)) | {
    "flip": ((1, "dims", None),),
    "roll": ((2, "dims", None),),
}


@register(*_ALONG, "_softmax", "_log_softmax", "_safe_softmax", nn.Softmax, nn.LogSoftmax)
class Along(Operation):
    """What works along a dimension and leaves every size as it is."""

    is_whole = False

    def couple(self, sizes: Sizes, event: Event) -> None:
        couple_pointwise(sizes, event)

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        if node.op != "call_module":
            return fuse_along(program, node, _ALONG)
        layer = program.module(node)
        function = F.softmax if isinstance(layer, nn.Softmax) else F.log_softmax
        return fuse_layer_along(program, node, function)


def fuse_layer_along(program: Program, node: fx.Node, function: object) -> Value | None:
    """Write a layer that works along `layer.dim` as a function."""
    layer = program.module(node)
    if program.is_shared(node):
        return program.same(node, SHARED)
    if not isinstance(layer.dim, int):
        return None
    return Value(program.call(function, program.first(node.args[0]), dim=behind_heads(layer.dim)), FIRST)  # type: ignore


_GATE: Dimensions = {"glu": ((1, "dim", -1),)}


@register("glu", nn.GLU)
class Gate(Operation):
    """The first half of a dimension, gated by the second."""

    is_whole = False

    def couple(self, sizes: Sizes, event: Event) -> None:
        axes = list(sizes.axes(event.args[0]))
        dim = (event.args[1] if len(event.args) > 1 else -1) % len(axes)
        half = free(axes[dim].size // 2)
        unify(axes[dim], concatenated([half, half]))
        axes[dim] = half
        sizes.set(event.out, axes)

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        return fuse_along(program, node, _GATE) if node.op != "call_module" else fuse_layer_along(program, node, F.glu)


_ANY: Dimensions = {"sort": ((1, "dim", None),), "tensor_split": ((2, "dim", 0),)}


@register(*_ANY)
class AlongUnknown(AlongOperation):
    """What works along a dimension, and keeps the sizes of all that it touches."""

    dimensions: ClassVar[Dimensions] = _ANY


_NORMALIZE: Dimensions = {"normalize": ((2, "dim", 1),)}


@register(*_NORMALIZE)
class Normalize(AlongOperation):
    """`F.normalize`: vectors of length one."""

    dimensions: ClassVar[Dimensions] = _NORMALIZE

    def couple_whole(self, sizes: Sizes, node: fx.Node, layer: None) -> Axes:
        sizes.set(node, list(sizes.value(argument(node, 0, "input"))))
        return []
