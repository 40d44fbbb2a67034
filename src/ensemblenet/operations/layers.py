"""What a layer's own numbers become when its tensors shrink: one rule per layer type, in a table open to users.

Parameters and buffers are handled by the algebra of sizes; a rule here only mends attributes such as `groups`. A layer
without a rule keeps its attributes. Add a rule of your own with [`layer_rule`][].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["LayerRule", "LayerSizes", "adapt_layer", "layer_rule"]


@dataclass(frozen=True)
class LayerSizes:
    """The sizes around a narrowed layer.

    Attributes:
        input: the shape of its first input.
        output: the shape of its output.
        groups: how many groups it has now, for a grouped convolution or normalisation.
    """

    input: tuple[int, ...]
    output: tuple[int, ...]
    groups: int | None


LayerRule = Callable[[Any, Any, LayerSizes], None]
_RULES: dict[type[nn.Module] | str, LayerRule] = {}


def layer_rule(*kinds: type[nn.Module] | str) -> Callable[[LayerRule], LayerRule]:
    """Register a rule for layer types, or for the names of types of other libraries.

    A rule takes the narrowed layer, whose parameters have their new shapes, the layer of the base, and the sizes.

    Example:
        >>> class Scaled(nn.Linear):
        ...     width = 8
        >>> @layer_rule(Scaled)
        ... def scaled(layer, base, sizes):
        ...     layer.width = sizes.output[-1]
    """

    def register(function: LayerRule) -> LayerRule:
        for kind in kinds:
            _RULES[kind] = function
        return function

    return register


def adapt_layer(layer: nn.Module, base: nn.Module, sizes: LayerSizes) -> None:
    """Apply the rules of a layer's type and of the types that it derives from, the most general first."""
    for kind in reversed(type(layer).__mro__):
        rule = _RULES.get(kind) or _RULES.get(kind.__name__)
        if rule is not None:
            rule(layer, base, sizes)


@layer_rule(nn.Linear)
def _linear(layer: nn.Linear, base: nn.Linear, sizes: LayerSizes) -> None:
    layer.out_features, layer.in_features = layer.weight.shape


@layer_rule(nn.modules.conv._ConvNd)
def _convolution(layer: nn.Conv2d, base: nn.Conv2d, sizes: LayerSizes) -> None:
    layer.groups = sizes.groups or layer.groups
    layer.in_channels, layer.out_channels = sizes.input[1], sizes.output[1]


@layer_rule("ScaledStdConv2d")
def _scaled_convolution(layer: Any, base: Any, sizes: LayerSizes) -> None:
    # timm's standardised convolutions divide by the root of the fan-in, computed once.
    layer.scale = base.scale * math.sqrt(base.weight[0].numel() / layer.weight[0].numel())


@layer_rule(nn.modules.batchnorm._NormBase)
def _batch_norm(layer: nn.BatchNorm2d, base: nn.BatchNorm2d, sizes: LayerSizes) -> None:
    layer.num_features = sizes.input[1]


@layer_rule(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(layer: nn.LayerNorm, base: nn.LayerNorm, sizes: LayerSizes) -> None:
    if layer.weight is not None:
        layer.normalized_shape = tuple(layer.weight.shape)
    else:
        layer.normalized_shape = sizes.input[-len(layer.normalized_shape) :]


@layer_rule(nn.GroupNorm)
def _group_norm(layer: nn.GroupNorm, base: nn.GroupNorm, sizes: LayerSizes) -> None:
    layer.num_groups = sizes.groups or layer.num_groups
    layer.num_channels = sizes.input[1]


@layer_rule(nn.PReLU)
def _prelu(layer: nn.PReLU, base: nn.PReLU, sizes: LayerSizes) -> None:
    layer.num_parameters = layer.weight.numel()


@layer_rule(nn.Embedding, nn.EmbeddingBag)
def _embedding(layer: nn.Embedding, base: nn.Embedding, sizes: LayerSizes) -> None:
    layer.embedding_dim = layer.weight.shape[1]


@layer_rule(nn.Unflatten)
def _unflatten(layer: nn.Unflatten, base: nn.Unflatten, sizes: LayerSizes) -> None:
    rank = len(sizes.input)
    dim = layer.dim % rank if isinstance(layer.dim, int) else rank - 1
    layer.unflattened_size = sizes.output[dim : dim + len(layer.unflattened_size)]


@layer_rule(nn.GRU)
def _gru(layer: nn.GRU, base: nn.GRU, sizes: LayerSizes) -> None:
    layer.input_size = layer.get_parameter("weight_ih_l0").shape[1]
    layer.hidden_size = layer.get_parameter("weight_hh_l0").shape[1]


@layer_rule(nn.MultiheadAttention)
def _attention(layer: nn.MultiheadAttention, base: nn.MultiheadAttention, sizes: LayerSizes) -> None:
    width = layer.out_proj.weight.shape[0]
    layer.embed_dim = layer.kdim = layer.vdim = width
    layer.num_heads = sizes.groups or base.num_heads
    layer.head_dim = width // layer.num_heads
    layer.out_proj.in_features = layer.out_proj.out_features = width
