"""Recurrent layers: what they cost, how they are narrowed, and what they begin with."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemblenet import convert, fuse, measure_cost
from ensemblenet.testing import check_conversion, check_full_width

X = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """The last step of a recurrent layer, classified; with a first state of zeros that the network makes itself."""

    def __init__(self, kind: type[nn.RNNBase], gives_state: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(12, 64)
        self.recurrent = kind(64, 96, **options)
        self.gives_state = gives_state
        self.directions = 2 if self.recurrent.bidirectional else 1
        self.out = self.recurrent.proj_size or 96
        self.last = nn.Linear(self.directions * self.out, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        state = None
        if self.gives_state:
            layers = self.directions * self.recurrent.num_layers
            state = torch.zeros(layers, x.shape[0], self.out)
            if isinstance(self.recurrent, nn.LSTM):
                state = state, x.new_zeros((layers, x.shape[0], 96))
        if self.recurrent.batch_first:
            return self.last(self.recurrent(x, state)[0][:, -1])
        return self.last(self.recurrent(x.transpose(0, 1), state)[0][-1])


class Cells(nn.Module):
    """A cell that the network's own loop calls."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.cell, self.last = nn.Linear(12, 64), kind(64, 96), nn.Linear(96, 5)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.size(0), 96)
        is_lstm = isinstance(self.cell, nn.LSTMCell)
        state = (state, torch.zeros(x.size(0), 96)) if is_lstm else state
        for step in self.embed(x).unbind(1):
            state = self.cell(step, state)
        return self.last(state[0] if is_lstm else state)


NETWORKS = {
    "lstm": lambda: Network(nn.LSTM, batch_first=True),
    "lstm, deep, both ways": lambda: Network(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True),
    "lstm, steps first, with a state": lambda: Network(nn.LSTM, gives_state=True),
    "lstm, projected": lambda: Network(nn.LSTM, True, proj_size=32, bidirectional=True, batch_first=True),
    "gru, without biases": lambda: Network(nn.GRU, True, bias=False),
    "rnn": lambda: Network(nn.RNN, batch_first=True),
    "rnn, both ways, relu": lambda: Network(nn.RNN, True, bidirectional=True, nonlinearity="relu", num_layers=2),
    "lstm cells": lambda: Cells(nn.LSTMCell),
    "gru cells": lambda: Cells(nn.GRUCell),
    "rnn cells": lambda: Cells(nn.RNNCell),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_recurrent_networks_are_converted_within_their_budget(name: str) -> None:
    base = NETWORKS[name]()
    report = check_conversion(base, X, budget=0.9, split_at="input")
    assert report.width > 0.6
    assert report.parameters_share > 0.8
    check_full_width(base, X, "input")
    model = convert(base, X, budget=0.9, split_at="input").eval()
    assert model.recipe is not None
    assert model.recipe.head.pinned == ()
    for layer in model.heads[0].modules():
        if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
            fresh = type(layer)(layer.input_size, layer.hidden_size, **_options(layer))
            assert {n: p.shape for n, p in layer.named_parameters()} == {
                n: p.shape for n, p in fresh.named_parameters()
            }
    torch.testing.assert_close(fuse(model)(X), model(X))


def _options(layer: nn.RNNBase | nn.RNNCellBase) -> dict[str, Any]:
    if isinstance(layer, nn.RNNCellBase):
        return {"bias": layer.bias}
    options = {name: getattr(layer, name) for name in ("num_layers", "bias", "bidirectional")}
    return options | ({"proj_size": layer.proj_size} if layer.proj_size else {})


def test_layers_that_are_one_operator_are_counted() -> None:
    """4 gates for each of 7 steps: 96 inputs and 80 states of the first layer's two directions, 2 * 80 of the next."""
    layer = nn.LSTM(96, 80, num_layers=2, bidirectional=True, batch_first=True)
    macs = 7 * 4 * 80 * 2 * ((96 + 80) + (2 * 80 + 80))
    cost = measure_cost(layer, torch.zeros(3, 7, 96))
    assert (cost.parameters, cost.macs) == (sum(p.numel() for p in layer.parameters()), macs)


def test_a_layer_of_a_users_own_keeps_its_width() -> None:
    class Reversed(nn.GRU):
        def forward(self, x: Tensor, state: None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x.flip(1))

    model = convert(Network(Reversed, batch_first=True), X, budget=2.0, split_at="embed")
    assert {head.get_submodule("recurrent").hidden_size for head in model.heads} == {96}


def test_fresh_gates_begin_at_their_own_scale() -> None:
    base = Network(nn.LSTM, batch_first=True)
    with torch.no_grad():
        base.recurrent.bias_ih_l0[96:192] = 1.0  # open forget gates, as many a recipe has them
        base.recurrent.weight_hh_l0[:96] *= 10.0
    head = convert(base, X, budget=0.9, split_at="input").heads[0]
    layer = head.get_submodule("recurrent")
    width = layer.hidden_size
    assert layer.bias_ih_l0[width : 2 * width].eq(1).all()
    assert not layer.bias_ih_l0[:width].eq(1).any()
    before = [gate.std() for gate in base.recurrent.weight_hh_l0.chunk(4)]
    for gate, of_base in zip(layer.weight_hh_l0.chunk(4), before, strict=True):
        torch.testing.assert_close(gate.std(), of_base * (96 / width) ** 0.5, rtol=0.05, atol=0)


def test_inherited_gates_keep_the_same_channels() -> None:
    base = Network(nn.GRU, batch_first=True)
    layer = convert(base, X, budget=0.9, split_at="input", init="inherit").heads[0].get_submodule("recurrent")
    rows = [
        [base.recurrent.bias_hh_l0[96 * k : 96 * k + 96].tolist().index(value) for value in gate.tolist()]
        for k, gate in enumerate(layer.bias_hh_l0.chunk(3))
    ]
    assert rows[0] == rows[1] == rows[2]
    torch.testing.assert_close(
        layer.weight_hh_l0[: layer.hidden_size], base.recurrent.weight_hh_l0[rows[0]][:, rows[0]]
    )
