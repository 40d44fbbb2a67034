"""Recurrent layers, as a whole: what runs inside (one fused kernel, or a product a step) differs by device and mode.

Shapes: N examples, L steps, I features in, H of a state, P that a step hands on (H, or fewer where an LSTM projects).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from ensemblenet.operations.axes import Axis, concatenated, free, kept, multiplied, unify
from ensemblenet.operations.coupling import Axes, LayerSizes, Sizes, argument
from ensemblenet.operations.registry import Operation, register

__all__ = ["Recurrent", "RecurrentCell"]

_GATES: dict[type[nn.Module], int] = {
    nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4, nn.RNNCell: 1, nn.GRUCell: 3, nn.LSTMCell: 4,
}  # fmt: skip


class _Step:
    """The axes of a layer's steps.

    Args:
        sizes: the equations.
        node: the call.
        layer: the layer.
    """

    def __init__(self, sizes: Sizes, node: fx.Node, layer: Any) -> None:
        own = type(layer).forward
        gates = next((gates for kind, gates in _GATES.items() if own is kind.forward), None)
        if gates is None:  # a type of the user's own, which may do anything
            raise NotImplementedError
        self.sizes = sizes
        self.node = node
        self.gates = gates
        self.hidden = free(layer.hidden_size)
        self.out = free(layer.proj_size) if getattr(layer, "proj_size", 0) else self.hidden

    def couple(self, suffix: str, features: Axis) -> Axis:
        """State the sizes of one direction of one layer; the axis of its MACs for each example and step."""
        # a gate after the other, each of the same state: so they keep the same channels
        gates = concatenated([self.hidden] * self.gates)
        self._weight(f"weight_ih{suffix}", gates, features)
        self._weight(f"weight_hh{suffix}", gates, self.out)
        macs = [multiplied([gates, features]), multiplied([gates, self.out])]
        if self.out is not self.hidden:
            self._weight(f"weight_hr{suffix}", self.out, self.hidden)
            macs.append(multiplied([self.out, self.hidden]))
        for name in ("bias_ih", "bias_hh"):
            ref = self.sizes.parameter_ref(self.node, name + suffix)
            if ref is not None:
                self.sizes.vector(ref, gates)
                self.sizes.bias(ref)
        return concatenated(macs)

    def _weight(self, name: str, written: Axis, contracted: Axis) -> None:
        ref = self.sizes.parameter_ref(self.node, name)
        if ref is None:  # computed from others, by a parametrisation
            raise NotImplementedError
        for own, axis in zip(self.sizes.axes(ref), (written, contracted), strict=True):
            unify(own, axis)
        self.sizes.weight(ref, [contracted], written)

    def states(self) -> Iterator[tuple[fx.Node, Axis]]:
        """The states that the call is given, each with the axis of its features."""
        given = argument(self.node, 1, "hx")
        for state, axis in zip(given if isinstance(given, tuple) else (given,), (self.out, self.hidden), strict=False):
            if isinstance(state, fx.Node):
                yield state, axis


def _set_outputs(sizes: Sizes, node: fx.Node, axes: Any) -> None:
    """Give a call's tensor its axes, or, where it gives a tuple, those parts that are taken from it."""
    if isinstance(axes, list):
        sizes.set(node, axes)
        return
    for part in node.users:
        if part.target is operator.getitem:
            _set_outputs(sizes, part, axes[part.args[1]])


@register(nn.RNNBase)
class Recurrent(Operation):
    """`nn.RNN`, `nn.GRU` and `nn.LSTM`: any number of layers, one direction or two, with projections or without."""

    def couple_whole(self, sizes: Sizes, node: fx.Node, layer: nn.RNNBase) -> Axes:
        """Layers and directions are equally wide: (N, L, I) to (N, L, directions * P)."""
        step = _Step(sizes, node, layer)
        x = sizes.value(argument(node, 0, "input"))
        *places, features = x
        rows = [axis for dim, axis in enumerate(places) if dim == (0 if layer.batch_first else 1)]
        for axis in places:
            if axis not in rows:
                axis.keep()  # steps
        directions = ("", "_reverse") if layer.bidirectional else ("",)
        macs = []
        for level in range(layer.num_layers):
            macs += [step.couple(f"_l{level}{direction}", features) for direction in directions]
            features = concatenated([step.out] * len(directions))
        state = [kept(layer.num_layers * len(directions)), *(rows if len(x) == 3 else ())]
        for given, axis in step.states():
            for own, expected in zip(sizes.value(given), [*state, axis], strict=True):
                unify(own, expected)
        states = [*state, step.out]
        _set_outputs(sizes, node, ([*places, features], (states, [*state, step.hidden]) if step.gates == 4 else states))
        return [*places, concatenated(macs)]

    def narrow(self, layer: Any, base: Any, sizes: LayerSizes) -> None:
        layer.input_size = layer.get_parameter("weight_ih_l0").shape[1]
        layer.hidden_size = (
            layer.get_parameter("weight_ih_l0").shape[0] * base.hidden_size // base.weight_ih_l0.shape[0]
        )
        if base.proj_size:
            layer.proj_size = layer.get_parameter("weight_hr_l0").shape[0]


@register(nn.RNNCellBase)
class RecurrentCell(Operation):
    """`nn.RNNCell`, `nn.GRUCell` and `nn.LSTMCell`: one step."""

    def couple_whole(self, sizes: Sizes, node: fx.Node, layer: nn.RNNCellBase) -> Axes:
        """(N, I) to (N, H)."""
        step = _Step(sizes, node, layer)
        *rows, features = sizes.value(argument(node, 0, "input"))
        macs = step.couple("", features)
        state = [*rows, step.hidden]
        for given, axis in step.states():
            for own, expected in zip(sizes.value(given), [*rows, axis], strict=True):
                unify(own, expected)
        _set_outputs(sizes, node, (state, state) if isinstance(layer, nn.LSTMCell) else state)
        return [*rows, macs]

    def narrow(self, layer: nn.RNNCellBase, base: nn.RNNCellBase, sizes: LayerSizes) -> None:
        layer.input_size, layer.hidden_size = layer.weight_ih.shape[1], layer.weight_hh.shape[1]
