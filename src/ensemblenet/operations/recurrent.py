"""Recurrent layers."""

from __future__ import annotations

import torch
from torch import nn

from ensemblenet.operations.axes import free, kept
from ensemblenet.operations.coupling import Event, LayerSizes, Sizes
from ensemblenet.operations.registry import Operation, register

__all__ = ["GRU", "Recurrent"]


@register(nn.RNNBase, nn.RNNCellBase)
class Recurrent(Operation):
    """Any recurrent layer."""

    def reset(self, layer: nn.RNNBase, generator: torch.Generator) -> None:
        """Draw the weights as the layer does itself: their scale follows from the width of its state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            layer.reset_parameters()


@register(nn.GRU)
class GRU(Recurrent):
    """Gated recurrent units, the one recurrent layer that is narrowed."""

    def couple_inside(self, sizes: Sizes, event: Event) -> bool:
        """The first state, zeros of shape (layers, N, C), is as wide as the layer."""
        if event.name != "zeros":
            return False
        sizes.set(event.out, [*(kept(size) for size in event.out.shape[:-1]), free(event.out.shape[-1])])
        return True

    def narrow(self, layer: nn.GRU, base: nn.GRU, sizes: LayerSizes) -> None:
        layer.input_size = layer.get_parameter("weight_ih_l0").shape[1]
        layer.hidden_size = layer.get_parameter("weight_hh_l0").shape[1]
