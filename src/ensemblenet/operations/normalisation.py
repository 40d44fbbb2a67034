"""Normalisations: by batch, by layer, by group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ensemblenet.operations.axes import free, kept, multiplied, unify
from ensemblenet.operations.coupling import (
    Axes,
    Event,
    LayerSizes,
    Narrowed,
    Sizes,
    TensorRef,
    argument,
    new_sizes,
    refs,
    set_argument,
    set_groups,
)
from ensemblenet.operations.fusion import FIRST, FOLDED, SHARED, Program, Value, aligned, arguments_of, fold
from ensemblenet.operations.registry import Operation, register

__all__ = ["FusedBatchNorm", "GroupNorm", "LayerNorm"]


@register(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm", "_batch_norm_impl_index",
)  # fmt: skip
class BatchNormOperator(Operation):
    """(N, C, *) with vectors of C."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        axes = sizes.axes(event.args[0])
        sizes.scale(event.args[1])
        for ref in event.args[1:5]:
            if isinstance(ref, TensorRef):
                sizes.vector(ref, axes[1])
        outs = refs(event.out)
        sizes.set(outs[0], list(axes))
        for other in outs[1:]:
            if len(other.shape) == 1 and other.shape[0] == axes[1].size:
                sizes.set(other, [axes[1]])


@register(nn.modules.batchnorm._NormBase)
class ChannelNorm(Operation):
    """Layers that normalise channels, over a batch or in each example."""

    def narrow(self, layer: nn.BatchNorm2d, base: nn.BatchNorm2d, sizes: LayerSizes) -> None:
        layer.num_features = sizes.input[1]

    def reset(self, layer: nn.BatchNorm2d, generator: torch.Generator) -> None:
        """The statistics of a layer that has seen no data."""
        layer.reset_running_stats()


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNorm(ChannelNorm):
    """Batch normalisation."""

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        if len(program.shape(node.args[0])) < 2:
            return None
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        stacks = [program.parameter(node, name) for name in names]
        fused = FusedBatchNorm(program.modules(node))
        return Value(program.run(str(node.target), fused, program.folded(node.args[0]), *stacks), FOLDED)


@register("timm.BatchNormAct2d")
class BatchNormAct(BatchNorm):
    """timm's batch normalisation with an activation in it."""

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        """The normalisation, then what drops and the activation, which treat every channel alone."""
        layer = program.module(node)
        if next(layer.act.parameters(), None) is not None:
            return None
        value = super().fuse(program, node)
        for part in ("drop", "act"):
            if value is not None:
                value = Value(program.run(f"{node.target}.{part}", getattr(layer, part), value.node), FOLDED)
        return value


class FusedBatchNorm(nn.Module):
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


@register("native_layer_norm", "_fused_rms_norm")
class LayerNormOperator(Operation):
    """(*, normalized) with weights of the normalised dimensions."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        axes = sizes.axes(event.args[0])
        sizes.scale(event.args[2])
        for ref in event.args[2:4]:
            if isinstance(ref, TensorRef):
                for own, axis in zip(sizes.axes(ref), axes[-len(ref.shape) :], strict=True):
                    unify(own, axis)
        first, *others = refs(event.out)
        sizes.set(first, list(axes))
        for other in others:
            sizes.set(other, [kept(1) if size == 1 else axis for size, axis in zip(other.shape, axes, strict=True)])


@register(nn.RMSNorm, "rms_norm")
class RMSNorm(LayerNormOperator):
    """Normalisation by the root of the mean square; older versions of PyTorch have an operator of that name."""

    def narrow(self, layer: nn.LayerNorm, base: nn.LayerNorm, sizes: LayerSizes) -> None:
        if layer.weight is not None:
            layer.normalized_shape = tuple(layer.weight.shape)
        else:
            layer.normalized_shape = sizes.input[-len(layer.normalized_shape) :]

    def renumber(self, narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
        (axes,) = narrowed.outputs(node)
        old = argument(copy, 1, "normalized_shape")
        if isinstance(old, (tuple, list)):
            set_argument(copy, 1, "normalized_shape", new_sizes(narrowed, axes[-len(old) :], old, copy))


@register(nn.LayerNorm, "timm.LayerNorm", "layer_norm")
class LayerNorm(RMSNorm):
    """Layer normalisation, as a layer and as a function."""

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        """Normalise without weights, which each head has of its own."""
        if node.op == "call_module":
            return self._fuse_layer(program, node)
        x, shape, weight, bias, eps = arguments_of(
            node, input=None, normalized_shape=None, weight=None, bias=None, eps=1e-5
        )
        if program.is_shared(node):
            return program.same(node, SHARED)
        if any(part is not None and program.value(part).layout is SHARED for part in (weight, bias)):
            return None
        parts = [None if part is None else program.first(part) for part in (weight, bias)]
        if not all(isinstance(size, int) for size in shape):
            return None
        return Value(program.call(layer_norm, program.first(x), *parts, shape, eps, len(program.shape(node))), FIRST)

    def _fuse_layer(self, program: Program, node: fx.Node) -> Value:
        layer = program.module(node)
        weight, bias = program.parameter(node, "weight"), program.parameter(node, "bias")
        call = partial(program.call, layer_norm, normalized_shape=layer.normalized_shape, eps=layer.eps)
        if program.is_shared(node) and weight is None:
            return program.same(node, SHARED)
        x = program.value(node.args[0]).node if program.is_shared(node) else program.first(node.args[0])
        return Value(call(x, weight=weight, bias=bias, rank=len(program.shape(node))), FIRST)


@register("timm.LayerNorm2d", "torchvision.LayerNorm2d")
class ChannelLayerNorm(LayerNorm):
    """Layer normalisation over the channels of images."""

    def fuse(self, program: Program, node: fx.Node) -> Value:
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


@register("native_group_norm")
class GroupNormOperator(Operation):
    """(N, C, *) in groups, with vectors of C."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        features, weight, bias = event.args[:3]
        axes = sizes.axes(features)
        sizes.scale(weight)
        groups = event.args[6]
        group = free(groups)
        if groups > 1:
            unify(axes[1], multiplied([group, free(axes[1].size // groups)]))
            sizes.group(event.node, group)
        for ref in (weight, bias):
            sizes.vector(ref, axes[1])
        sizes.set(event.out[0], list(axes))
        for statistics in event.out[1:]:
            sizes.set(statistics, [axes[0], group])


@register(nn.GroupNorm, "group_norm")
class GroupNorm(Operation):
    """Group normalisation, as a layer and as a function."""

    def narrow(self, layer: nn.GroupNorm, base: nn.GroupNorm, sizes: LayerSizes) -> None:
        layer.num_groups = sizes.groups or layer.num_groups
        layer.num_channels = sizes.input[1]

    def renumber(self, narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
        set_groups(narrowed, node, copy, 1, "num_groups")

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        """A layer: heads are more groups."""
        if node.op != "call_module":
            return None
        layer = program.module(node)
        stacks = (program.parameter(node, name) for name in ("weight", "bias"))
        weight, bias = (None if stack is None else program.method("flatten", stack) for stack in stacks)
        groups = layer.num_groups * program.num_heads
        return Value(program.call(F.group_norm, program.folded(node.args[0]), groups, weight, bias, layer.eps), FOLDED)


@register(nn.LocalResponseNorm, "local_response_norm")
class LocalResponseNorm(Operation):
    """Each channel by its neighbours, (N, C, *): a window that slides over the channels, however many there are."""

    def couple_whole(self, sizes: Sizes, node: fx.Node, layer: nn.LocalResponseNorm | None) -> Axes:
        sizes.set(node, list(sizes.value(argument(node, 0, "input"))))
        return []
