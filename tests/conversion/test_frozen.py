"""Bases that do not train all of their parameters, and bases without values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ensemblenet import EnsembleNet, convert, plans, split_points
from ensemblenet.errors import ConversionError
from ensemblenet.testing import check_conversion

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def perceptron(*frozen: str) -> nn.Sequential:
    """Layers "0", "2", "4" and "6", those named frozen."""
    torch.manual_seed(0)
    layers = (nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    base = nn.Sequential(*layers)
    for name in frozen:
        base.get_submodule(name).requires_grad_(False)
    return base


def frozen_names(model: EnsembleNet) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("split_at", ["input", "2"])
def test_frozen_layers_are_not_drawn_anew(split_at: str) -> None:
    expected = r'2 frozen parameters .*: 0\.bias, 0\.weight\. Pass init="inherit", or unfreeze'
    with pytest.raises(ConversionError, match=expected):
        convert(perceptron("0"), X, split_at=split_at)


def test_many_frozen_layers_are_counted() -> None:
    with pytest.raises(ConversionError, match=r"6 frozen .*: 0\.bias, 0\.weight, 2\.bias and 3 more\.") as caught:
        convert(perceptron("0", "2", "4"), X)
    assert "\n" not in str(caught.value)


def test_a_frozen_recurrent_layer_is_not_drawn_anew() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.lstm, self.out = nn.Linear(8, 32), nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 3)
            self.lstm.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(self.stem(x))[0][:, -1])

    with pytest.raises(ConversionError, match=r"4 frozen .*lstm\.bias_hh_l0"):
        convert(Recurrent(), torch.randn(2, 5, 8), budget=4.0)
    assert len(frozen_names(convert(Recurrent(), torch.randn(2, 5, 8), budget=4.0, init="inherit"))) in (4, 8)


def test_frozen_layers_of_the_trunk_stay_as_they_are() -> None:
    base = perceptron("0", "2")
    model = convert(base, X, split_at="2", init="inherit")
    assert frozen_names(model) == {"trunk.0.weight", "trunk.0.bias", "trunk.2.weight", "trunk.2.bias"}
    assert torch.equal(model.trunk.get_parameter("2.weight"), base[2].weight)
    model.train()(X).sum().backward()
    check_conversion(base, X, split_at="2", init="inherit")


def test_frozen_layers_of_heads_stay_as_they_are_at_full_width_and_are_never_cut() -> None:
    base = perceptron("2")
    model = convert(base, X, budget=4.0, split_at="0", init="inherit")
    assert frozen_names(model) == {f"heads.{k}.2.{name}" for k in range(2) for name in ("weight", "bias")}
    assert all(torch.equal(head.get_parameter("2.weight"), base[2].weight) for head in model.heads)
    with pytest.raises(ConversionError, match=r"Heads of width 0\.\d+ would keep a part of 2 frozen .*: 2\.bias"):
        convert(base, X, budget=1.0, split_at="0", init="inherit")


class Adapted(nn.Module):
    """A frozen layer with a trained update of low rank."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.whole = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x) + self.up(self.down(x))


def test_low_rank_updates_train_on_frozen_layers_of_full_width() -> None:
    base = nn.Sequential(Adapted(8, 64), nn.ReLU(), Adapted(64, 64), nn.ReLU(), nn.Linear(64, 3))
    with pytest.raises(ConversionError, match="4 frozen parameters"):
        convert(base, X)
    model = convert(base, X, budget=4.0, split_at="input", init="inherit")
    assert {name.split(".")[-2] for name in frozen_names(model)} == {"whole"}
    model.train()(X).sum().backward()
    assert all((parameter.grad is None) != parameter.requires_grad for parameter in model.parameters())


def test_what_is_frozen_by_design_is_cut_as_buffers_are() -> None:
    """Fixed position embeddings and the like are parts of the structure, which heads keep their channels of."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.out = nn.Linear(8, 64), nn.Linear(64, 3)
            self.places = nn.Parameter(torch.arange(64.0), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.stem(x) + self.places).relu())

    head = convert(Placed(), X, budget=0.9, split_at="input").heads[0]
    places = head.get_parameter("places")
    assert len(places) < 64
    assert set(places.tolist()) <= set(range(64))
    assert not places.requires_grad


def test_a_fixed_table_keeps_its_values_where_all_else_is_drawn_anew() -> None:
    """Sinusoids of positions in a frozen nn.Embedding, as in Whisper and Marian."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.places, self.out = nn.Linear(8, 64), nn.Embedding(6, 64), nn.Linear(64, 3)
            self.places.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.stem(x) + self.places(torch.arange(x.shape[1]))).relu().mean(1))

    base, x = Placed(), torch.randn(4, 6, 8)
    head = convert(base, x, budget=2.0, split_at="stem").heads[0]
    assert torch.equal(head.get_parameter("places.weight"), base.places.weight)
    assert not torch.equal(head.get_parameter("out.weight"), base.out.weight)
    assert not head.get_parameter("places.weight").requires_grad


def test_a_base_with_nothing_to_train_is_refused_but_can_be_looked_at() -> None:
    base = perceptron("0", "2", "4", "6")
    with pytest.raises(ConversionError, match="nothing to train") as caught:
        convert(base, X, init="inherit")
    assert "\n" not in str(caught.value)
    assert [point.name for point in split_points(base, X)] == [p.name for p in split_points(perceptron(), X)]


@pytest.mark.parametrize("function", [convert, plans, split_points])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_base_without_values_is_refused(function, device: str) -> None:
    with pytest.raises(ConversionError, match=r"\"meta\" and has no values: base\.to_empty") as caught:
        function(perceptron().to("meta"), X.to(device))
    assert "\n" not in str(caught.value)


def test_inputs_that_no_recipe_can_name_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"are of torch\.float8_e5m2; .*float64, float32"):
        convert(perceptron(), X.to(torch.float8_e5m2))
