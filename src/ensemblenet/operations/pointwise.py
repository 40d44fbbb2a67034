"""What treats every number alone, and what drops some of them."""

from __future__ import annotations

import math

import torch
from torch import fx, nn

from ensemblenet.operations.axes import kept, unify
from ensemblenet.operations.coupling import Event, LayerSizes, Narrowed, Sizes, argument, name_of, refs
from ensemblenet.operations.fusion import (
    FIRST,
    FOLDED,
    SHARED,
    Layout,
    Program,
    Value,
    aligned_value,
    per_channel,
)
from ensemblenet.operations.registry import Operation, register

__all__ = ["Dropout", "Pointwise", "PointwiseOperator"]

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Tanhshrink,
    nn.Identity,
    *(f"timm.{name}" for name in ("GELU", "GELUTanh", "QuickGELU", "Swish", "Mish", "Sigmoid", "Tanh")),
    *(f"timm.{name}" for name in ("HardSwish", "HardSigmoid", "HardMish")),
)  # fmt: skip
_FUNCTIONS = (
    "add", "sub", "mul", "div", "truediv", "true_divide", "pow", "neg", "abs", "exp", "log", "log1p", "expm1", "sqrt",
    "rsqrt", "square", "reciprocal", "sign", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "where",
    "masked_fill", "lerp", "addcmul", "addcdiv", "sin", "cos", "erf",
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "logsigmoid", "tanh",
    "hardtanh", "hardswish", "hardsigmoid", "softplus", "softsign", "dropout", "alpha_dropout",
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not",
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "clone", "detach", "contiguous",
    "zeros_like", "ones_like",
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__neg__",
    "__pow__",
)  # fmt: skip
# by the name of an operation in place, the method that is not
_IN_PLACE = {f"{name}_": name for name in _FUNCTIONS if not name.startswith("_")} | {
    "__iadd__": "__add__", "__isub__": "__sub__", "__imul__": "__mul__", "__itruediv__": "__truediv__",
    "iadd": "__add__", "isub": "__sub__", "imul": "__mul__", "itruediv": "__truediv__",
}  # fmt: skip
_SCALINGS = {"mul", "div", "truediv", "true_divide", "__mul__", "__rmul__", "__truediv__"}
_SUMS = {"sum", "norm", "vector_norm", "linalg_vector_norm", "normalize"}
# operators without PyTorch's tag that treat every number alone too, or every position of what is normalised
_UNTAGGED = (
    "clone", "_to_copy", "detach", "alias", "contiguous", "copy", "fill", "native_dropout", "masked_fill", "bernoulli",
    "normal", "uniform", "zero", "lift_fresh", "where", "hardswish", "_prelu_kernel", "as_strided", "zeros_like",
    "ones_like", "rand_like", "empty_like", "randn_like", "full_like",
)  # fmt: skip


def couple_pointwise(sizes: Sizes, event: Event) -> None:
    """Every dimension meets its like, counted from the last; sizes of one are broadcast."""
    inputs = refs((event.args, event.kwargs))
    for out in refs(event.out):
        axes = [kept(1) for _ in out.shape]
        for ref in inputs:
            own = sizes.axes(ref)
            for dim in range(-min(len(own), len(axes)), 0):
                if own[dim].size == 1:
                    continue
                if axes[dim].size == 1:
                    axes[dim] = own[dim]
                else:
                    unify(axes[dim], own[dim])
        sizes.set(out, axes)


@register("pointwise", *_UNTAGGED)
class PointwiseOperator(Operation):
    """Operators that PyTorch tags as pointwise, and others like them."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        if event.name == "as_strided_" and event.out.shape != refs((event.args, event.kwargs))[0].shape:
            raise NotImplementedError
        if event.name in ("mul", "mul_"):
            for factor in refs(event.args):
                sizes.scale(factor)
        couple_pointwise(sizes, event)


@register(*_ACTIVATIONS, *_FUNCTIONS, *_IN_PLACE)
class Pointwise(PointwiseOperator):
    """Activations, arithmetic and comparisons, as layers and as functions."""

    is_whole = False

    def couple(self, sizes: Sizes, event: Event) -> None:
        """Dimensions meet their like.

        An operator in place that PyTorch does not tag keeps its sizes: saved models have been narrowed so.
        """
        if event.name.removesuffix("_") not in _UNTAGGED and torch.Tag.pointwise not in event.op.tags:
            raise NotImplementedError
        super().couple(sizes, event)

    def renumber(self, narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
        """A mean or a norm by hand, `x.sum(1) / 64` or `F.normalize(x) * 64**0.5`, has fewer channels now."""
        if name_of(node) not in _SCALINGS or len(node.args) != 2:
            return
        for k in (0, 1):
            number, other = copy.args[k], node.args[1 - k]
            if isinstance(number, (int, float)) and isinstance(other, fx.Node) and name_of(other) in _SUMS:
                copy.update_arg(k, _rescaled(narrowed, other, number))

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        """In the layout that its inputs have, or with heads in front."""
        name = type(program.module(node)).__name__ if node.op == "call_module" else name_of(node)
        tensors = [argument for argument in node.all_input_nodes if program.is_tensor(argument)]
        if "dropout" in name.lower() and program.is_shared(node):
            copies = program.method("contiguous", program.first(tensors[0]))  # for dropout in place
            return program.same(node, FIRST, {tensors[0]: copies})
        if program.is_shared(node):
            return program.same(node, SHARED)
        if name == "contiguous":
            return program.value(tensors[0])
        layouts = {program.value(argument).layout for argument in tensors}
        if len(layouts) == 1 and _are_alike(program, tensors, layouts):
            return program.same(node, layouts.pop())
        rank = len(program.shape(node))
        aligned = {argument: aligned_value(program, argument, rank) for argument in tensors}
        if name not in _IN_PLACE:
            return program.same(node, FIRST, aligned)
        plain = program.same(node, FIRST, aligned, _IN_PLACE[name])  # in place, a view could not grow
        program.set_value(tensors[0], plain)
        return plain


def _rescaled(narrowed: Narrowed, total: fx.Node, number: float) -> float:
    """A number that is a power of how many channels a sum or a norm is over, for as many as there are now."""
    before, after = narrowed.axes(total.all_input_nodes[0]), narrowed.axes(total)
    if name_of(total) == "normalize":
        axis = before[argument(total, 2, "dim", 1)]
        old, new = axis.size, narrowed.size(axis)
    else:
        old = math.prod(axis.size for axis in before) // math.prod(axis.size for axis in after)
        new = math.prod(map(narrowed.size, before)) // math.prod(map(narrowed.size, after))
    power = next((power for power in (1, 0.5, -0.5, -1) if math.isclose(number, old**power)), None)
    return number if old == new or power is None else type(number)(new**power)


def _are_alike(program: Program, tensors: list[fx.Node], layouts: set[Layout]) -> bool:
    """Whether tensors of one layout can be combined as they are."""
    shapes = [program.shape(argument) for argument in tensors]
    return len({len(shape) for shape in shapes}) == 1 and (
        layouts == {FIRST} or len({shape[1] for shape in shapes}) == 1
    )


@register("log_sigmoid_forward")
class LogSigmoid(Operation):
    """The operator of `F.logsigmoid`."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        """The result has the input's shape, and on a CPU a buffer comes with it."""
        result, *buffers = refs(event.out)
        sizes.set(result, list(sizes.axes(event.args[0])))
        for buffer in buffers:
            sizes.set(buffer, [kept(size) for size in buffer.shape])


@register(nn.modules.dropout._DropoutNd, nn.RReLU)
class Random(Operation):
    """Layers that are random in training mode; a trace does not open them, whatever else is known of them."""


@register(nn.Dropout, nn.AlphaDropout)
class Dropout(Pointwise):
    """Dropout of single numbers."""

    is_whole = True


@register(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, "dropout2d", "dropout3d", "feature_dropout")
class ChannelDropout(Operation):
    """Dropout of whole channels."""

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        return per_channel(program, node)


@register("timm.DropPath", "torchvision.StochasticDepth")
class DropPath(Operation):
    """Dropout of whole examples."""

    is_whole = False

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        layer = program.module(node)
        if getattr(layer, "mode", "row") != "row":
            return None
        x = program.method("flatten", program.first(node.args[0]), 0, 1)
        out = program.run(str(node.target), layer, x)
        return Value(program.method("unflatten", out, 0, (program.num_heads, -1)), FIRST)


@register(nn.PReLU)
class PReLU(Operation):
    """Leaky activations whose slopes are learned."""

    def narrow(self, layer: nn.PReLU, base: nn.PReLU, sizes: LayerSizes) -> None:
        layer.num_parameters = layer.weight.numel()

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        layer, rank = program.module(node), len(program.shape(node.args[0]))
        if layer.num_parameters == 1 or rank < 2:
            return None
        slopes = program.parameter(node, "weight")
        return Value(
            program.call(torch.nn.functional.prelu, program.folded(node.args[0]), program.method("flatten", slopes)),
            FOLDED,
        )
