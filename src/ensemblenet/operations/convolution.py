"""Convolutions. Heads are groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ensemblenet.operations.axes import Axis, free, kept, multiplied, unify
from ensemblenet.operations.coupling import Axes, Event, LayerSizes, Narrowed, Sizes, set_groups
from ensemblenet.operations.fusion import FOLDED, Program, Value
from ensemblenet.operations.registry import Operation, register

__all__ = ["Convolution", "FusedConvolution"]

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_FEW = 2**18  # numbers of a gradient that are few for a GPU, as measured on an H200
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


@register("convolution", "_convolution")
class ConvolutionOperator(Operation):
    """(N, C, *) with weights (C_out, C / groups, *), or (C, C_out / groups, *) if transposed."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        """Positions keep their sizes, unless the kernel is one; groups of channels may become fewer."""
        features, weight, bias = event.args[:3]
        transposed, groups = event.args[6], event.args[8]
        sizes.rows(weight)
        batch, channels, *space = sizes.axes(features)
        first, second, *kernel = sizes.axes(weight)
        new_space = [kept(size) for size in event.out.shape[2:]]
        for dim, (axis, window) in enumerate(zip(space, kernel, strict=True)):
            if axis.size == new_space[dim].size and (window.size == 1 or channels.size == 1):
                new_space[dim] = axis  # a kernel of one; or one that slides over channels, as in ECA
            else:
                axis.keep()
            window.keep()
        if groups == 1:
            unify(channels, first if transposed else second)
            out = second if transposed else first
        else:
            group = free(groups)
            out = _grouped(channels, first, second, group, transposed=transposed)
            sizes.group(event.node, group)
        sizes.weight(weight, [first if transposed else second], out)
        if bias is not None:
            sizes.vector(bias, out)
            sizes.bias(bias)
        sizes.set(event.out, [batch, out, *new_space])

    def work(self, sizes: Sizes, event: Event) -> Axes:
        """A product for each number of the result (of the input, if transposed) and of a filter."""
        transposed = event.args[6]
        return [*sizes.axes(event.args[0] if transposed else event.out), *sizes.axes(event.args[1])[1:]]


def _grouped(channels: Axis, first: Axis, second: Axis, group: Axis, *, transposed: bool) -> Axis:
    """The output channels of a grouped convolution."""
    unify(channels, multiplied([group, free(channels.size // group.size) if transposed else second]))
    if transposed:
        unify(first, channels)
        return multiplied([group, second])
    unify(first, multiplied([group, free(first.size // group.size)]))
    return first


@register(nn.modules.conv._ConvNd)
class AnyConvolution(Operation):
    """Layers of convolution, of any rank and either direction."""

    def narrow(self, layer: nn.Conv2d, base: nn.Conv2d, sizes: LayerSizes) -> None:
        layer.groups = sizes.groups or layer.groups
        layer.in_channels, layer.out_channels = sizes.input[1], sizes.output[1]

    def renumber(self, narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
        set_groups(narrowed, node, copy, 6, "groups")


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d, "conv1d", "conv2d", "conv3d")
class Convolution(AnyConvolution):
    """Convolutions, as layers and as functions."""

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        """A layer as one grouped convolution."""
        if node.op != "call_module":
            return None
        return self.fuse_with(program, node, program.parameter(node, "weight"))

    def fuse_with(self, program: Program, node: fx.Node, weight: fx.Node | None) -> Value | None:
        """The layer with those weights, (K, O, C, *)."""
        layer, argument = program.module(node), node.args[0]
        if len(program.shape(argument)) != layer.weight.ndim:
            return None  # without a batch dimension
        shared = program.is_shared(node) and layer.groups == 1
        x = program.value(argument).node if shared else program.folded(argument)
        fused = FusedConvolution(layer, program.num_heads, shared)
        return Value(program.run(str(node.target), fused, x, weight, program.parameter(node, "bias")), FOLDED)


@register("timm.ScaledStdConv2d")
class ScaledConvolution(Convolution):
    """timm's convolution whose weights are standardised."""

    def narrow(self, layer: Any, base: Any, sizes: LayerSizes) -> None:
        """It divides by the root of the fan-in, which timm computes once."""
        super().narrow(layer, base, sizes)
        layer.scale = base.scale * math.sqrt(base.weight[0].numel() / layer.weight[0].numel())

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        layer = program.module(node)
        stacks = program.parameter(node, "weight"), program.parameter(node, "gain")
        return self.fuse_with(program, node, program.call(standardised, *stacks, layer.scale, layer.eps))


def standardised(weight: Tensor, gain: Tensor, scale: float, eps: float) -> Tensor:
    """The weights (K, O, C, *) with mean 0 and the gains' standard deviation, as timm's layer has them."""
    rows = weight.reshape(1, gain.numel(), -1)
    rows = F.batch_norm(rows, None, None, weight=(gain * scale).flatten(), training=True, momentum=0.0, eps=eps)
    return rows.reshape_as(weight)


@register(
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
class TransposedConvolution(AnyConvolution):
    """Transposed convolutions."""

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        if node.op != "call_module":
            return None
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


@register("_weight_norm_interface")
class WeightNorm(Operation):
    """Directions of a weight and their lengths along one dimension."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        direction, length = (sizes.axes(ref) for ref in event.args[:2])
        for own, axis in zip(length, direction, strict=True):
            if own.size != 1:
                unify(own, axis)
        sizes.set(event.out[0], list(direction))
        sizes.set(event.out[1], list(length))


class FusedConvolution(nn.Module):
    """The convolution of K heads, from (N, K·C, *) or, of the trunk's output, (N, C, *) to (N, K·O, *).

    Args:
        layer: the first head's.
        num_heads: K.
        shared: whether the input is the same for all heads, so that it is read once.
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
        self.is_product = not shared and layer.groups == 1 and self.pads is None and _is_pointwise(layer)
        self.separate = {True: False, False: False}  # whether heads run one by one, with gradients and without

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Weights are stacked: (K, O, C, *) and (K, O)."""
        if self.pads is not None:
            x = F.pad(x, self.pads, mode=self.pad_mode)
        if not self.separate[torch.is_grad_enabled()]:
            if self.is_product and _suits_products(x):
                return pointwise_products(x, weight, bias, self.settings["stride"])
            bias = None if bias is None else bias.flatten()
            return self.function(x, weight.flatten(0, 1), bias, groups=self.groups, **self.settings)
        biases = [None] * self.num_heads if bias is None else bias.unbind()
        parts = zip(x.chunk(self.num_heads, 1), weight.unbind(), biases, strict=True)
        groups = self.groups // self.num_heads
        return torch.cat([self.function(*part, groups=groups, **self.settings) for part in parts], 1)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"groups={self.groups}, separate={self.separate}"


def _is_pointwise(layer: nn.Conv2d) -> bool:
    """Whether a convolution looks at one position alone."""
    padding = layer.padding if isinstance(layer.padding, tuple) else ()  # "same" and "valid" pad nothing here
    return all(size == 1 for size in layer.kernel_size) and not any(padding)


def _suits_products(x: Tensor) -> bool:
    """Whether batched products were measured to be faster than grouped convolutions: docs/heads.md.

    In float32, convolutions use TF32 and products, unless they are told to, do not.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return x.is_cuda and dtype in (torch.bfloat16, torch.float16) and x.movedim(1, -1).is_contiguous()


def pointwise_products(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int]) -> Tensor:
    """The pointwise convolutions of K heads as one batched product.

    Args:
        x: shape (N, K·C, *), channels last in memory.
        weight: shape (K, O, C, 1...).
        bias: shape (K, O).
        stride: of every dimension of *.

    Returns:
        Shape (N, K·O, *), channels last in memory.
    """
    if any(step > 1 for step in stride):
        kept = x[(..., *(slice(None, None, step) for step in stride))]
        x = kept.movedim(1, -1).contiguous().movedim(-1, 1)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    weight = weight.flatten(2)
    if torch.compiler.is_compiling():  # a compiler does not see through the views that are written to
        rows = torch.bmm(_rows(x, len(weight)), weight.mT)  # (K, N·*, O)
        out = rows.transpose(0, 1).reshape(len(x), *x.shape[2:], -1).movedim(-1, 1)
    else:
        out = _Products.apply(x, weight)
    return out if bias is None else out + bias.to(out.dtype).reshape(-1, *(1,) * len(stride))  # pyright: ignore


def _rows(x: Tensor, num_heads: int) -> Tensor:
    """(N, K·C, *) to (K, N·*, C); no copy where channels lie last."""
    return x.movedim(1, -1).reshape(-1, num_heads, x.shape[1] // num_heads).transpose(0, 1)


class _Products(torch.autograd.Function):
    """(N, K·C, *) by weights (K, O, C) to (N, K·O, *), without a copy: every head is read and written in its place."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        heads, width, _ = weight.shape
        out = x.new_empty(len(x), *x.shape[2:], heads * width)
        torch.bmm(_rows(x, heads), weight.mT, out=out.view(-1, heads, width).transpose(0, 1))
        return out.movedim(-1, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        of_x = _Products.apply(grad, weight.mT) if ctx.needs_input_grad[0] else None
        of_weight = _sums_of_products(grad, x, len(weight)) if ctx.needs_input_grad[1] else None
        return of_x, of_weight  # pyright: ignore[reportReturnType]


def _sums_of_products(left: Tensor, right: Tensor, num_heads: int) -> Tensor:
    """(N, K·O, *) and (N, K·C, *) to (K, O, C), summed over examples and positions: the gradient of weights.

    Where few numbers come out of long sums, a batched product leaves most of a GPU idle. One product of all channels
    with all, of which each head's own are kept, is several times as fast there.
    """
    a, b = _rows(left, num_heads), _rows(right, num_heads)
    if left.shape[1] * b.shape[2] > _FEW:
        return torch.bmm(a.mT, b)
    every = torch.mm(a.transpose(0, 1).flatten(1).mT, b.transpose(0, 1).flatten(1))
    return every.unflatten(0, (num_heads, -1)).unflatten(2, (num_heads, -1)).diagonal(0, 0, 2).movedim(-1, 0)
