"""Repair heads that have lost channels or blocks of a trained base, before any training.

Shapes: N examples, C channels, * positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ensemblenet.conversion.importance import Batches, Inheritance, telling
from ensemblenet.ensemble import EnsembleNet, as_tuple
from ensemblenet.inputs import call

__all__ = ["renew_statistics", "repair"]

_LEAST = 1e-6  # a standard deviation below this is that of a dead channel, which no scale can mend


def renew_statistics(model: nn.Module, parts: Sequence[nn.Module], batches: Batches) -> None:
    """Take the running statistics of parts of a model anew: the mean over batches, as a pass in training mode would.

    Args:
        model: the whole; it is left in evaluation mode.
        parts: those whose statistics are renewed.
        batches: of inputs and targets.
    """
    layers = [layer for layer in _normalisations(parts) if layer.running_mean is not None]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None  # the mean over batches
    with torch.no_grad():
        for inputs, _ in batches:
            with telling("A head in training mode", inputs):
                call(model, inputs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def repair(model: EnsembleNet, base: nn.Module, inheritance: Inheritance, batches: Batches) -> None:
    """Give heads that are less than the base the statistics of its outputs on some batches.

    Linear layers and convolutions that no batch normalisation follows get the scale and bias with which each output has
    its mean and standard deviation in the base, one layer after another; then statistics of batch normalisation are
    taken anew. Both do the same (Jordan et al. 2022, arXiv 2211.08403). Of `nn.MultiheadAttention` it is the output
    projection. Heads of full width and depth, layers that are frozen, called twice or tied to others, transposed
    convolutions in groups and recurrent layers are left as they are; so is the trunk, which is the base's own.

    Args:
        model: fresh from the conversion; it is left in evaluation mode.
        base: the trained network.
        inheritance: what its heads inherited.
        batches: of inputs and targets.
    """
    if not inheritance.is_narrow and not inheritance.shape.dropped:
        return
    base = getattr(base, "_orig_mod", base)  # of torch.compile
    inherited = inheritance.design.parameters.keys() - inheritance.anew
    names = _unnormalised(model.heads[0], inherited)  # pyright: ignore[reportArgumentType]
    sources = [{name: inheritance.layer(k, name) for name in names} for k in range(model.num_heads)]
    expected = _moments_of_base(base, {source for own in sources for source in own.values()}, batches)
    model.eval()
    with torch.no_grad():
        given = [as_tuple(call(model.trunk, inputs)) for inputs, _ in batches] if names else []
        for k, head in enumerate(model.heads):
            for layer in _normalisations([head]):
                layer.train()
            for name, source in sources[k].items():
                rows = inheritance.rows(k, f"{name}.weight", _dim_of_outputs(head.get_submodule(name)))
                _match(head, name, expected[source], rows, given)
    renew_statistics(model, list(model.heads), batches)


class _Moments:
    """A hook that adds up the mean and standard deviation of each output of a layer, over examples and positions."""

    def __init__(self) -> None:
        self._count = 0
        self._sums = torch.zeros(2, 1, dtype=torch.float64)

    def __call__(self, layer: nn.Module, args: Any, out: Any) -> None:
        out = as_tuple(out)[0]  # attention gives its weights too
        dim = out.ndim - layer.get_parameter("weight").ndim + 1 if isinstance(layer, _ConvNd) else -1
        values = out.detach().movedim(dim, 0).flatten(1).double().cpu()
        self._count += values.shape[1]
        self._sums = self._sums + torch.stack([values.sum(1), values.square().sum(1)])

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (C,) each."""
        mean, square = self._sums / self._count
        return mean, (square - mean.square()).clamp(min=0).sqrt()


def _moments_of_base(base: nn.Module, names: set[str], batches: Batches) -> dict[str, tuple[Tensor, Tensor]]:
    moments = {name: _Moments() for name in names}
    handles = [_called(base, name).register_forward_hook(moment) for name, moment in moments.items()]
    was_training = base.training
    try:
        with torch.no_grad():
            for inputs, _ in batches if names else ():
                with telling("The base", inputs):
                    call(base.eval(), inputs)
    finally:
        base.train(was_training)
        for handle in handles:
            handle.remove()
    return {name: moment.result() for name, moment in moments.items()}


def _match(
    head: nn.Module, name: str, expected: tuple[Tensor, Tensor], rows: Sequence[int], given: Sequence[Any]
) -> None:
    """Scale and shift a layer's outputs to the moments of those of the base's outputs that it has."""
    moments, layer = _Moments(), head.get_submodule(name)
    handle = _called(head, name).register_forward_hook(moments)
    for features in given:
        head(*features)
    handle.remove()
    (mean, spread), (base_mean, base_spread) = moments.result(), (part[list(rows)] for part in expected)
    scale = torch.where(spread > _LEAST, base_spread / spread, 1.0)
    weight, bias = layer.get_parameter("weight"), layer.bias
    weight.movedim(_dim_of_outputs(layer), -1).mul_(scale.to(weight))
    if isinstance(bias, Tensor):
        bias.copy_((bias.cpu() - mean) * scale + base_mean)


def _called(network: nn.Module, name: str) -> nn.Module:
    """The module whose call gives a layer's outputs: attention calls none for its output projection."""
    parent = network.get_submodule(name.rpartition(".")[0])
    return parent if isinstance(parent, nn.MultiheadAttention) else network.get_submodule(name)


def _dim_of_outputs(layer: nn.Module) -> int:
    """Along which dimension of its weight a layer's outputs lie."""
    return 1 if isinstance(layer, _ConvTransposeNd) else 0


def _unnormalised(head: fx.GraphModule, inherited: Container[str]) -> list[str]:
    """The linear layers and convolutions of a head that may be scaled, and that no batch normalisation follows."""
    calls = [node for node in head.graph.nodes if node.op == "call_module"]
    layers = {node: head.get_submodule(node.target) for node in calls}
    read = Counter(id(p) for layer in layers.values() for p in layer.parameters())  # by every call
    names = {
        node: f"{node.target}.out_proj" if isinstance(layer, nn.MultiheadAttention) else node.target
        for node, layer in layers.items()
    }
    return [
        name
        for node, name in names.items()
        if isinstance(layer := head.get_submodule(name), (nn.Linear, _ConvNd))
        and not (isinstance(layer, _ConvTransposeNd) and layer.groups > 1)
        and isinstance(layer._parameters.get("weight"), Tensor)
        and all(own.requires_grad and read[id(own)] == 1 for own in layer.parameters())
        and f"{name}.weight" in inherited
        and not all(isinstance(layers.get(user), _NormBase) for user in node.users)
    ]


def _normalisations(parts: Sequence[nn.Module]) -> list[_NormBase]:
    return [layer for part in parts for layer in part.modules() if isinstance(layer, _NormBase)]
