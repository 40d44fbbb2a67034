"""How each operation of a head runs for all heads at once: one small function each, in a table open to users."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ensemblenet.heads.program import FIRST, FOLDED, SHARED, Layout, Program, Value, fold, fusion_rule, name_of

__all__ = ["JoinedBatchNorm", "JoinedConvolution"]

# -- convolutions: heads are groups


class JoinedConvolution(nn.Module):
    """The convolution of K heads, from (N, K·C, *) or, of the trunk's output, (N, C, *) to (N, K·O, *).

    Args:
        layer: the first head's.
        num_heads: K.
        shared: the input is the same for all heads, so that it is read once.
    """

    def __init__(self, layer: nn.Conv2d, num_heads: int, shared: bool) -> None:
        super().__init__()
        self.function: Callable[..., Tensor] = _CONVOLUTIONS[layer.weight.ndim]
        self.num_heads = num_heads
        self.groups = layer.groups * (1 if shared else num_heads)
        self.settings: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.pads: list[int] | None = None
        self.pad_mode = layer.padding_mode
        if layer.padding_mode != "zeros":
            self.pads, self.settings["padding"] = list(layer._reversed_padding_repeated_twice), 0
        self.can_separate = not shared
        self.separate = {True: False, False: False}  # whether heads run one by one, with gradients and without

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Weights are stacked: (K, O, C, *) and (K, O)."""
        if self.pads is not None:
            x = F.pad(x, self.pads, mode=self.pad_mode)
        if not self.separate[torch.is_grad_enabled()]:
            bias = None if bias is None else bias.flatten()
            return self.function(x, weight.flatten(0, 1), bias, groups=self.groups, **self.settings)
        biases = [None] * self.num_heads if bias is None else bias.unbind()
        parts = zip(x.chunk(self.num_heads, 1), weight.unbind(), biases, strict=True)
        groups = self.groups // self.num_heads
        return torch.cat([self.function(*part, groups=groups, **self.settings) for part in parts], 1)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"groups={self.groups}, separate={self.separate}"


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def _convolve(program: Program, node: fx.Node, weight: fx.Node | None = None) -> Value | None:
    layer, argument = program.module(node), node.args[0]
    if len(program.shape(argument)) != layer.weight.ndim:
        return None  # without a batch dimension
    shared = program.is_shared(node) and layer.groups == 1
    x = program.value(argument).node if shared else program.folded(argument)
    joined = JoinedConvolution(layer, program.num_heads, shared)
    weight = program.parameter(node, "weight") if weight is None else weight
    return Value(program.run(str(node.target), joined, x, weight, program.parameter(node, "bias")), FOLDED)


@fusion_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(program: Program, node: fx.Node) -> Value | None:
    return _convolve(program, node)


@fusion_rule("timm.ScaledStdConv2d")
def _scaled_convolution(program: Program, node: fx.Node) -> Value | None:
    layer = program.module(node)
    stacks = program.parameter(node, "weight"), program.parameter(node, "gain")
    return _convolve(program, node, program.call(standardised, *stacks, layer.scale, layer.eps))


def standardised(weight: Tensor, gain: Tensor, scale: float, eps: float) -> Tensor:
    """The weights (K, O, C, *) with mean 0 and the gains' standard deviation, as timm's layer has them."""
    rows = weight.reshape(1, gain.numel(), -1)
    rows = F.batch_norm(rows, None, None, weight=(gain * scale).flatten(), training=True, momentum=0.0, eps=eps)
    return rows.reshape_as(weight)


@fusion_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed_convolution(program: Program, node: fx.Node) -> Value | None:
    layer = program.module(node)
    if len(node.args) != 1 or node.kwargs or len(program.shape(node.args[0])) != layer.weight.ndim:
        return None
    weight, bias = program.parameter(node, "weight"), program.parameter(node, "bias")
    out = program.call(
        _TRANSPOSED[layer.weight.ndim],
        program.folded(node.args[0]),
        program.method("flatten", weight, 0, 1),
        None if bias is None else program.method("flatten", bias),
        stride=layer.stride,
        padding=layer.padding,
        output_padding=layer.output_padding,
        groups=layer.groups * program.num_heads,
        dilation=layer.dilation,
    )
    return Value(out, FOLDED)


# -- linear layers: batched products


@fusion_rule(nn.Linear, "timm.Linear")
def _linear(program: Program, node: fx.Node) -> Value:
    weight, bias = program.parameter(node, "weight"), program.parameter(node, "bias")
    if program.is_shared(node):
        return Value(program.call(linear_of_shared, program.value(node.args[0]).node, weight, bias), FIRST)
    return Value(program.call(linear, program.first(node.args[0]), weight, bias), FIRST)


@fusion_rule("linear")
def _linear_function(program: Program, node: fx.Node) -> Value | None:
    x, weight, bias = _arguments(node, input=None, weight=None, bias=None)
    if program.value(weight).layout is SHARED or (bias is not None and program.value(bias).layout is SHARED):
        return None
    bias = None if bias is None else program.first(bias)
    return Value(program.call(linear, program.first(x), program.first(weight), bias), FIRST)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(K, *, C) by weights (K, O, C) to (K, *, O)."""
    rows = x.reshape(len(weight), -1, x.shape[-1])
    weight = weight.transpose(1, 2)
    out = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight)
    return out.view(*x.shape[:-1], out.shape[-1])


def linear_of_shared(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(*, C), read once, by weights (K, O, C) to (K, *, O)."""
    out = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return out.unflatten(-1, (len(weight), -1)).movedim(-2, 0)


# -- normalisations


class JoinedBatchNorm(nn.Module):
    """The batch normalisation of K heads, on (N, K·C, *).

    Statistics and counters are stacks of the heads' own, so that an update here is one there. The layers' mode is the
    first head's.

    Args:
        layers: of the heads.
    """

    def __init__(self, layers: Sequence[nn.BatchNorm2d]) -> None:
        super().__init__()
        self.layers = tuple(layers)  # a tuple: they belong to their heads

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        count: Tensor | None,
    ) -> Tensor:
        """All but `x` are stacked: (K, C), and (K,) of counters."""
        layer = self.layers[0]
        factor = layer.momentum
        if layer.training and count is not None:
            count.add_(1)
            factor = 1 / float(count[0]) if factor is None else factor
        weight, bias, mean, var = (None if part is None else part.flatten() for part in (weight, bias, mean, var))
        own_statistics = layer.training or mean is None
        return F.batch_norm(x, mean, var, weight, bias, own_statistics, factor or 0.0, layer.eps)


@fusion_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(program: Program, node: fx.Node) -> Value | None:
    if len(program.shape(node.args[0])) < 2:
        return None
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    stacks = [program.parameter(node, name) for name in names]
    joined = JoinedBatchNorm(program.modules(node))
    return Value(program.run(str(node.target), joined, program.folded(node.args[0]), *stacks), FOLDED)


@fusion_rule("timm.BatchNormAct2d")
def _batch_norm_act(program: Program, node: fx.Node) -> Value | None:
    layer = program.module(node)
    if next(layer.act.parameters(), None) is not None:
        return None
    value = _batch_norm(program, node)
    for part in ("drop", "act"):
        if value is not None:
            value = Value(program.run(f"{node.target}.{part}", getattr(layer, part), value.node), FOLDED)
    return value


@fusion_rule(nn.GroupNorm)
def _group_norm(program: Program, node: fx.Node) -> Value:
    layer = program.module(node)
    weight, bias = (_flattened(program, program.parameter(node, name)) for name in ("weight", "bias"))
    groups = layer.num_groups * program.num_heads
    return Value(program.call(F.group_norm, program.folded(node.args[0]), groups, weight, bias, layer.eps), FOLDED)


@fusion_rule(nn.LayerNorm, "timm.LayerNorm")
def _layer_norm(program: Program, node: fx.Node) -> Value:
    layer = program.module(node)
    weight, bias = program.parameter(node, "weight"), program.parameter(node, "bias")
    call = partial(program.call, layer_norm, normalized_shape=layer.normalized_shape, eps=layer.eps)
    if program.is_shared(node) and weight is None:
        return program.same(node, SHARED)
    x = program.value(node.args[0]).node if program.is_shared(node) else program.first(node.args[0])
    return Value(call(x, weight=weight, bias=bias, rank=len(program.shape(node))), FIRST)


@fusion_rule("timm.LayerNorm2d", "torchvision.LayerNorm2d")
def _layer_norm_2d(program: Program, node: fx.Node) -> Value:
    layer = program.module(node)
    weight, bias = program.parameter(node, "weight"), program.parameter(node, "bias")
    x = program.method("movedim", program.first(node.args[0]), 2, -1)
    shape = layer.normalized_shape
    out = program.call(layer_norm, x, weight=weight, bias=bias, normalized_shape=shape, eps=layer.eps, rank=4)
    return Value(program.call(fold, program.method("movedim", out, -1, 2)), FOLDED)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_shape: Sequence[int], eps: float, rank: int
) -> Tensor:
    """(K, *, C), or (*, C) for all heads, of that rank in a head, with weights (K, C)."""
    out = F.layer_norm(x, tuple(normalized_shape), eps=eps)
    if weight is None:
        return out
    weight = aligned(weight, rank).type_as(out)
    return out * weight if bias is None else torch.addcmul(aligned(bias, rank).type_as(out), out, weight)


@fusion_rule(nn.PReLU)
def _prelu(program: Program, node: fx.Node) -> Value | None:
    layer, rank = program.module(node), len(program.shape(node.args[0]))
    if layer.num_parameters == 1 or rank < 2:
        return None
    weight = program.method("flatten", program.parameter(node, "weight"))
    return Value(program.call(F.prelu, program.folded(node.args[0]), weight), FOLDED)


# -- attention: heads are examples


@fusion_rule("scaled_dot_product_attention")
def _attention(program: Program, node: fx.Node) -> Value | None:
    arguments = _arguments(node, query=None, key=None, value=None)
    batches = {program.shape(argument)[:-2] for argument in arguments}
    if len(node.args) > 3 or node.kwargs.get("attn_mask") is not None or len(batches) > 1 or batches == {()}:
        return None
    queries, *others = (program.method("flatten", program.first(argument), 0, 1) for argument in arguments)
    rest = {key: program.value(v).node for key, v in node.kwargs.items() if key not in ("query", "key", "value")}
    out = program.call(F.scaled_dot_product_attention, queries, *others, **rest)
    return Value(program.method("unflatten", out, 0, (program.num_heads, -1)), FIRST)


@fusion_rule(nn.MultiheadAttention)
def _multihead_attention(program: Program, node: fx.Node) -> Value | None:
    layer = program.module(node)
    query, key, value, *others = _arguments(node, query=None, key=None, value=None, key_padding_mask=None)
    plain = layer.batch_first and layer._qkv_same_embed_dim and layer.bias_k is None and not layer.add_zero_attn
    options = {key: option for key, option in node.kwargs.items() if key not in ("query", "key", "value")}
    if not plain or query is not key or query is not value or others != [None] or len(node.args) > 3:
        return None
    if options.pop("need_weights", True) or any(option is not None for option in options.values()):
        return None
    if len(program.shape(query)) != 3:
        return None
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    stacks = [program.parameter(node, name) for name in names]
    joined = JoinedAttention(layer)
    return Value(program.run(str(node.target), joined, program.first(query), *stacks), FIRST)


class JoinedAttention(nn.Module):
    """The self-attention of K heads of the model, each of several attention heads, on (K, N, T, C).

    Args:
        layer: the first head's.
    """

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.layers = (layer,)  # in a tuple: it belongs to its head

    def forward(
        self, x: Tensor, in_weight: Tensor, in_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None
    ) -> tuple[Tensor, None]:
        """Weights are stacked: (K, 3C, C) and (K, C, C)."""
        (layer,) = self.layers
        k, n, length, width = x.shape
        parts = linear(x, in_weight, in_bias).view(k * n, length, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = layer.dropout if layer.training else 0.0
        out = F.scaled_dot_product_attention(*parts.unbind(0), dropout_p=dropout)
        return linear(out.transpose(1, 2).reshape(k, n, length, width), out_weight, out_bias), None


# -- what treats every channel alone: pooling, resizing, dropout of channels

_POOLING = [
    getattr(nn, f"{kind}{rank}d")
    for kind in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "Dropout")
    for rank in (1, 2, 3)
    if hasattr(nn, f"{kind}{rank}d")
]


@fusion_rule(
    *_POOLING, nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d,
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d",
    "interpolate", "dropout2d", "dropout3d", "feature_dropout",
)  # fmt: skip
def _per_channel(program: Program, node: fx.Node) -> Value | None:
    name = type(program.module(node)).__name__.lower() if node.op == "call_module" else name_of(node)
    if program.is_shared(node) and "dropout" not in name:
        return program.same(node, SHARED)
    rank = len(program.shape(node.args[0]))
    if rank != len(program.shape(node)) or rank < 3 or (name[-2:] in ("1d", "2d", "3d") and rank != int(name[-2]) + 2):
        return None  # without a batch dimension
    argument = node.all_input_nodes[0]
    return program.same(node, FOLDED, {argument: program.folded(argument)})


# -- what treats every example alone


@fusion_rule("timm.DropPath", "torchvision.StochasticDepth")
def _drop_path(program: Program, node: fx.Node) -> Value | None:
    layer = program.module(node)
    if getattr(layer, "mode", "row") != "row":
        return None
    x = program.method("flatten", program.first(node.args[0]), 0, 1)
    out = program.run(str(node.target), layer, x)
    return Value(program.method("unflatten", out, 0, (program.num_heads, -1)), FIRST)


# -- what treats every number alone

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Tanhshrink,
    nn.Identity, nn.Dropout, nn.AlphaDropout,
    *(f"timm.{name}" for name in ("GELU", "GELUTanh", "QuickGELU", "Swish", "Mish", "Sigmoid", "Tanh")),
    *(f"timm.{name}" for name in ("HardSwish", "HardSigmoid", "HardMish")),
)  # fmt: skip
_POINTWISE = (
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
_IN_PLACE = {f"{name}_": name for name in _POINTWISE if not name.startswith("_")} | {
    "__iadd__": "__add__", "__isub__": "__sub__", "__imul__": "__mul__", "__itruediv__": "__truediv__",
    "iadd": "__add__", "isub": "__sub__", "imul": "__mul__", "itruediv": "__truediv__",
}  # fmt: skip


@fusion_rule(*_ACTIVATIONS, *_POINTWISE, *_IN_PLACE)
def _pointwise(program: Program, node: fx.Node) -> Value | None:
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
    aligned_tensors = {argument: _aligned(program, argument, rank) for argument in tensors}
    if name not in _IN_PLACE:
        return program.same(node, FIRST, aligned_tensors)
    plain = program.same(node, FIRST, aligned_tensors, _IN_PLACE[name])  # in place, a view could not grow
    program.set_value(tensors[0], plain)
    return plain


def _are_alike(program: Program, tensors: list[fx.Node], layouts: set[Layout]) -> bool:
    """Whether tensors of one layout can be combined as they are."""
    shapes = [program.shape(argument) for argument in tensors]
    return len({len(shape) for shape in shapes}) == 1 and (
        layouts == {FIRST} or len({shape[1] for shape in shapes}) == 1
    )


def _aligned(program: Program, argument: fx.Node, rank: int) -> fx.Node:
    """An argument in a form that broadcasts to (K, *) with * of that rank: a SHARED one does as it is."""
    value = program.value(argument)
    if value.layout is SHARED:
        return value.node
    x = program.first(argument)
    return x if len(program.shape(argument)) == rank else program.call(aligned, x, rank)


def aligned(x: Tensor, rank: int) -> Tensor:
    """(K, *) with ones behind K, so that * has that rank."""
    return x.reshape(x.shape[0], *(1,) * (rank - x.ndim + 1), *x.shape[1:])


# -- what moves and reduces dimensions: the heads are one more in front

_ALL = object()  # all dimensions, where none is named
# By name: the positions and names of arguments that are dimensions, and what they are where they are left out.
_DIMENSIONS: dict[str, list[tuple[int, str, Any]]] = {
    **{
        name: [(1, "dim", None)] for name in ("softmax", "log_softmax", "unsqueeze", "select", "narrow", "index_select")
    },
    **{name: [(1, "dim", None)] for name in ("cumsum", "argmax", "argmin", "sort", "squeeze", "unflatten")},
    "flip": [(1, "dims", None)],
    **{name: [(1, "dim", _ALL)] for name in ("mean", "sum", "amax", "amin", "var", "std", "logsumexp")},
    "unbind": [(1, "dim", 0)],
    **{name: [(2, "dim", 0)] for name in ("chunk", "split", "split_with_sizes", "tensor_split")},
    **{name: [(1, "dim0", None), (2, "dim1", None)] for name in ("transpose", "swapaxes", "swapdims")},
    "movedim": [(1, "source", None), (2, "destination", None)],
    "normalize": [(2, "dim", 1)],
    "glu": [(1, "dim", -1)],
    "roll": [(2, "dims", None)],
    "flatten": [(1, "start_dim", 0), (2, "end_dim", -1)],
}


@fusion_rule(*_DIMENSIONS)
def _with_dimensions(program: Program, node: fx.Node) -> Value | None:
    if program.is_shared(node):
        return program.same(node, SHARED)
    if program.value(node.args[0]).layout is SHARED:
        return None
    args, kwargs = list(node.args), dict(node.kwargs)
    for position, name, default in _DIMENSIONS[name_of(node)]:
        given = args[position] if position < len(args) else kwargs.get(name, default)
        if default is _ALL and (given is _ALL or given is None):
            given = tuple(range(len(program.shape(node.args[0]))))
        if not _are_dimensions(given):
            return None
        if position < len(args):
            args[position] = _behind_heads(given)
        else:
            kwargs[name] = _behind_heads(given)
    return _rewritten(program, node, args, kwargs)


def _are_dimensions(given: Any) -> bool:
    return isinstance(given, int) or (isinstance(given, (tuple, list)) and all(isinstance(d, int) for d in given))


def _behind_heads(dims: Any) -> Any:
    """A dimension of a head's tensor, or several, in the stack of them; negative ones count from the end in both."""
    if isinstance(dims, int):
        return dims + 1 if dims >= 0 else dims
    return type(dims)(_behind_heads(dim) for dim in dims)


def _rewritten(program: Program, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Value:
    """Write a node with other arguments; what it reads is FIRST, or SHARED as it is."""

    def read(argument: fx.Node) -> Any:
        value = program.value(argument)
        return value.node if value.layout is SHARED else program.first(argument)

    args, kwargs = fx.map_arg((tuple(args), kwargs), read)  # type: ignore[assignment]
    if node.op == "call_method":
        return Value(program.method(str(node.target), *args, **kwargs), FIRST)
    return Value(program.call(node.target, *args, **kwargs), FIRST)  # type: ignore[arg-type]


@fusion_rule(nn.Flatten, nn.Unflatten, nn.Softmax, nn.LogSoftmax, nn.GLU)
def _layer_with_dimensions(program: Program, node: fx.Node) -> Value | None:
    layer = program.module(node)
    if program.is_shared(node):
        return program.same(node, SHARED)
    x = program.first(node.args[0])
    if isinstance(layer, nn.Flatten):
        dims = _behind_heads((layer.start_dim, layer.end_dim))
        return Value(program.call(torch.flatten, x, *dims), FIRST)
    if not isinstance(layer.dim, int):
        return None
    dim = _behind_heads(layer.dim)
    if isinstance(layer, nn.Unflatten):
        return Value(program.method("unflatten", x, dim, layer.unflattened_size), FIRST)
    function = {nn.Softmax: F.softmax, nn.LogSoftmax: F.log_softmax, nn.GLU: F.glu}[type(layer)]
    return Value(program.call(function, x, dim=dim), FIRST)


@fusion_rule("permute", "view", "reshape", "expand", "repeat")
def _with_sizes(program: Program, node: fx.Node) -> Value | None:
    if program.is_shared(node):
        return program.same(node, SHARED)
    name, (argument, *sizes) = name_of(node), node.args
    if node.kwargs or not isinstance(argument, fx.Node) or program.value(argument).layout is SHARED:
        return None
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    if not sizes or isinstance(sizes[0], torch.dtype):
        return None
    x, sizes = program.first(argument), [program.value(size).node for size in sizes]
    if name == "permute":
        rank = len(program.shape(argument))
        return Value(program.method("permute", x, 0, *(dim % rank + 1 for dim in sizes)), FIRST)
    if name in ("expand", "repeat"):
        x = _aligned(program, argument, len(sizes))
        return Value(program.method(name, x, -1 if name == "expand" else 1, *sizes), FIRST)
    return Value(program.method("reshape", x, program.num_heads, *sizes), FIRST)


@fusion_rule("cat", "concat", "concatenate", "stack")
def _concatenate(program: Program, node: fx.Node) -> Value | None:
    tensors, dim = _arguments(node, tensors=None, dim=0)
    if program.is_shared(node):
        return program.same(node, SHARED)
    rank = len(program.shape(node))
    folded = any(program.value(tensor).layout is FOLDED for tensor in tensors)
    parts = [program.first(tensor) for tensor in tensors]
    if folded and dim % rank == 1 and name_of(node) != "stack":
        return Value(program.call(concatenate_channels, parts), FOLDED)
    return Value(program.call(node.target, parts, _behind_heads(dim)), FIRST)  # type: ignore[arg-type]


def concatenate_channels(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (K, N, C, *) to (N, K·(C + C + ...), *), head-major."""
    return torch.cat([part.transpose(0, 1) for part in parts], 2).flatten(1, 2)


@fusion_rule("matmul", "bmm", "__matmul__")
def _matrix_product(program: Program, node: fx.Node) -> Value | None:
    ranks = [len(program.shape(argument)) for argument in node.args]
    if program.is_shared(node):
        return program.same(node, SHARED)
    if min(ranks) < 2:
        return None
    factors = [_aligned(program, factor, max(ranks)) for factor in node.args if isinstance(factor, fx.Node)]
    return Value(program.call(torch.matmul, *factors), FIRST)


@fusion_rule("pad")
def _pad(program: Program, node: fx.Node) -> Value | None:
    _, pads, mode = _arguments(node, input=None, pad=None, mode="constant")
    if program.is_shared(node):
        return program.same(node, SHARED)
    if mode == "constant":
        return _rewritten(program, node, node.args, dict(node.kwargs))
    return _per_channel(program, node) if len(pads) // 2 <= len(program.shape(node)) - 2 else None


@fusion_rule("layer_norm")
def _layer_norm_function(program: Program, node: fx.Node) -> Value | None:
    x, shape, weight, bias, eps = _arguments(node, input=None, normalized_shape=None, weight=None, bias=None, eps=1e-5)
    if program.is_shared(node):
        return program.same(node, SHARED)
    if any(part is not None and program.value(part).layout is SHARED for part in (weight, bias)):
        return None
    parts = [None if part is None else program.first(part) for part in (weight, bias)]
    if not all(isinstance(size, int) for size in shape):
        return None
    return Value(program.call(layer_norm, program.first(x), *parts, shape, eps, len(program.shape(node))), FIRST)


# -- what reads parts and sizes


@fusion_rule("getitem", "__getitem__")
def _item(program: Program, node: fx.Node) -> Value | None:
    source, index = node.args
    value = program.value(source)
    if not program.is_tensor(source):  # of a tuple
        return program.same(node, value.layout)
    items = index if isinstance(index, tuple) else (index,)
    tensors = [item for item in items if isinstance(item, (fx.Node, list, Tensor)) and not _is_number(program, item)]
    if program.is_shared(node):
        return program.same(node, SHARED)
    if value.layout is SHARED or len(tensors) > 1 or any(not _is_plain(program, item) for item in tensors):
        return None
    return _rewritten(program, node, (source, (slice(None), *items)), {})


@fusion_rule("setitem", "__setitem__")
def _set_item(program: Program, node: fx.Node) -> None:
    target = node.all_input_nodes[0]
    if not program.is_shared(node) and program.value(target).layout is SHARED:  # from here on every head has its own
        program.set_value(target, Value(program.method("contiguous", program.first(target)), FIRST))


def _is_number(program: Program, item: Any) -> bool:
    return isinstance(item, fx.Node) and not program.is_tensor(item)


def _is_plain(program: Program, item: Any) -> bool:
    return not isinstance(item, fx.Node) or program.value(item).layout is SHARED


@fusion_rule("size")
def _size(program: Program, node: fx.Node) -> Value:
    argument, dim = _arguments(node, input=None, dim=None)
    if program.is_shared(node):
        return program.same(node, SHARED)
    sizes = program.method("size", program.first(argument))
    index = slice(1, None) if dim is None else _behind_heads(dim)
    return Value(program.call(operator.getitem, sizes, index), SHARED)


@fusion_rule("getattr")
def _attribute(program: Program, node: fx.Node) -> Value | None:
    argument, name = node.args
    value = program.value(argument)
    if value.layout is SHARED or name in ("device", "dtype"):
        return program.same(node, SHARED)
    if name == "shape":
        sizes = program.method("size", program.first(argument))
        return Value(program.call(operator.getitem, sizes, slice(1, None)), SHARED)
    return None


def _arguments(node: fx.Node, **defaults: Any) -> list[Any]:
    """The arguments of those names, in the order in which a call has them."""
    names = list(defaults)
    given = dict(zip(names, node.args, strict=False)) | {k: v for k, v in node.kwargs.items() if k in defaults}
    return [given.get(name, defaults[name]) for name in names]


def _flattened(program: Program, stack: fx.Node | None) -> fx.Node | None:
    return None if stack is None else program.method("flatten", stack)
