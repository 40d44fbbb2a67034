"""Attention. Heads of the model are more examples; the layer's own heads may become fewer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ensemblenet.operations.axes import concatenated, free, multiplied, unify
from ensemblenet.operations.coupling import Axes, Event, LayerSizes, Sizes
from ensemblenet.operations.fusion import FIRST, SHARED, Program, Value, aligned_value, arguments_of, fold, unfold
from ensemblenet.operations.linear import linear
from ensemblenet.operations.registry import Operation, register

__all__ = ["FusedAttention", "MultiheadAttention"]


@register(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
class AttentionOperator(Operation):
    """Queries (N, H, L, D), keys (N, H, S, D), values (N, H, S, E): (N, H, L, E)."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        query, key, value = (sizes.axes(ref) for ref in event.args[:3])
        for dim in (0, 1):
            unify(query[dim], key[dim])
            unify(query[dim], value[dim])
        unify(query[3], key[3])
        unify(key[2], value[2])
        mask = event.kwargs.get("attn_mask")
        if mask is not None:
            for own, axis in zip(sizes.axes(mask), (*query[:3], key[2]), strict=True):
                if own.size != 1:
                    unify(own, axis)
        sizes.set(event.out[0], [*query[:3], value[3]])
        if event.out[1].shape == event.out[0].shape[:3]:  # the logarithms of the sums
            sizes.set(event.out[1], query[:3])

    def work(self, sizes: Sizes, event: Event) -> Axes:
        query, key, value = (sizes.axes(ref) for ref in event.args[:3])
        return [*query[:-1], key[-2], concatenated([query[-1], value[-1]])]  # one product for the weights, one behind


@register("scaled_dot_product_attention")
class AttentionFunction(Operation):
    """`F.scaled_dot_product_attention`."""

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        query, key, value, mask, dropout, *options = arguments_of(
            node, query=None, key=None, value=None, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
            enable_gqa=False,
        )  # fmt: skip
        rank, *others = {len(program.shape(tensor)) for tensor in (query, key, value)}
        if others or len(program.shape(mask)) > rank:
            return None
        if program.is_shared(node) and dropout == 0.0:
            return program.same(node, SHARED)
        mask = None if mask is None else aligned_value(program, mask, rank)
        tensors = [program.first(tensor) for tensor in (query, key, value)]
        return Value(
            program.call(attention, *tensors, mask, *(program.value(o).node for o in (dropout, *options))), FIRST
        )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Queries (K, *, L, D), keys (K, *, S, D) and values (K, *, S, E) to (K, *, L, E).

    The mask is one that all heads have, or (K, *, L, S) with as many dimensions as the queries. The fast kernels want
    four dimensions: without a mask, heads of the model are more examples, which copies nothing; with one they are more
    attention heads, so that what examples share of the mask is not copied for each.
    """
    attend, parts = F.scaled_dot_product_attention, (query, key, value)
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if query.ndim != 5 or len({part.shape[1] for part in parts}) > 1:
        return attend(query, key, value, mask, dropout, **options)
    num_heads = len(query)
    if mask is None:
        query, key, value = (part.flatten(0, 1) for part in parts)
        return attend(query, key, value, mask, dropout, **options).unflatten(0, (num_heads, -1))
    size = max(part.shape[2] for part in parts)
    if not enable_gqa:  # keys that all attention heads share would be shared by all heads of the model too
        query, key, value = (part.expand(-1, -1, size, -1, -1) for part in parts)
    if mask.ndim == query.ndim:
        mask = fold(mask.expand(-1, -1, size, -1, -1))
    elif mask.ndim > 2 and mask.shape[-3] > 1:
        mask = torch.cat([mask] * num_heads, -3)
    query, key, value = map(fold, (query, key, value))
    return unfold(attend(query, key, value, mask, dropout, **options), num_heads)


@register(nn.MultiheadAttention)
class MultiheadAttention(Operation):
    """`nn.MultiheadAttention`."""

    def tie(self, sizes: Sizes, node: fx.Node, layer: nn.MultiheadAttention) -> None:
        """The layer wants its inner width to be its input's, and to be heads of one width."""
        written, inner = sizes.parameter(node, "out_proj.weight")
        unify(inner, written)
        for argument in node.args[:3]:
            assert isinstance(argument, fx.Node)
            width = sizes.value(argument)[-1]
            if layer.in_proj_weight is None:
                width.keep()
            else:
                unify(width, written)
        heads = free(layer.num_heads)
        unify(inner, multiplied([heads, free(layer.head_dim)]))
        sizes.group(node, heads)

    def narrow(self, layer: nn.MultiheadAttention, base: nn.MultiheadAttention, sizes: LayerSizes) -> None:
        width = layer.out_proj.weight.shape[0]
        layer.embed_dim = layer.kdim = layer.vdim = width
        layer.num_heads = sizes.groups or base.num_heads
        layer.head_dim = width // layer.num_heads
        layer.out_proj.in_features = layer.out_proj.out_features = width

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        """Plain self-attention without masks and without its weights as a result."""
        layer = program.module(node)
        query, key, value, *others = arguments_of(node, query=None, key=None, value=None, key_padding_mask=None)
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
        return Value(program.run(str(node.target), FusedAttention(layer), program.first(query), *stacks), FIRST)


class FusedAttention(nn.Module):
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
