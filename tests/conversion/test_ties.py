"""Weights that several places of a network share."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemblenet import convert
from ensemblenet.testing import check_conversion, check_full_width

IDS = torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


class LanguageModel(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self, output: Callable[["LanguageModel", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.out = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
        self.out.weight = self.e.weight
        self.block = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.output = output

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        return self.output(self, x + self.block(x))


class Albert(nn.Module):
    """Blocks of their own modules with the first one's weights; attention, a perceptron and a norm in each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.last = nn.Linear(16, 64), nn.Linear(64, 5)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(64, 8, 128, batch_first=True) for _ in range(3))
        for block in self.blocks[1:]:
            for name, parameter in self.blocks[0].named_parameters():
                owner, _, key = name.rpartition(".")
                setattr(block.get_submodule(owner), key, parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(1))


class Transposed(nn.Module):
    """An autoencoder's weight, read both ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.last = nn.Linear(16, 64), nn.Linear(64, 5)
        self.weight = nn.Parameter(torch.randn(96, 64) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((F.linear(self.stem(x), self.weight).relu() @ self.weight).mean(1))


@pytest.mark.parametrize(
    ("base", "x", "split_at"),
    [
        (LanguageModel(lambda net, x: net.out(x)), IDS, "e"),
        (LanguageModel(lambda net, x: F.linear(x, net.e.weight)), IDS, "e"),
        (LanguageModel(lambda net, x: x @ net.e.weight.T), IDS, "e"),
        (Albert(), TOKENS, "input"),
        (Transposed(), TOKENS, "input"),
    ],
    ids=["layer", "function", "product", "blocks", "transposed"],
)
def test_shared_weights_are_narrowed_together(base: nn.Module, x: Tensor, split_at: str) -> None:
    assert check_conversion(base, x, budget=0.9, split_at=split_at).width > 0.5
    check_full_width(base, x, split_at)
    model = convert(base, x, budget=0.9, split_at=split_at)
    assert model.recipe is not None
    assert model.recipe.head.pinned == ()


def test_tied_embeddings_stay_tied_in_a_head_and_begin_at_the_output_layers_scale() -> None:
    base = LanguageModel(lambda net, x: net.out(x))
    model = convert(base, IDS, budget=0.9, split_at="input")
    for head in model.heads:
        assert head.get_submodule("e").weight is head.get_submodule("out").weight
        width = head.get_submodule("e").weight.shape[1]
        torch.testing.assert_close(
            head.get_submodule("e").weight.std(), base.e.weight.std() * (64 / width) ** 0.5, rtol=0.03, atol=0
        )


def test_a_tied_parameter_may_be_read_by_its_second_name() -> None:
    class Predictions(nn.Module):  # as the head of masked words in transformers
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(12))
            self.decoder = nn.Linear(32, 12)
            self.decoder.bias = self.bias
            self.shared = nn.Embedding(20, 32)
            self.encoder = nn.ModuleDict({"tokens": nn.Embedding(20, 32), "layer": nn.Linear(32, 32)})
            self.encoder["tokens"].weight = self.shared.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.decoder(self.encoder["layer"](self.encoder["tokens"](ids)).relu())

    check_conversion(Predictions(), torch.randint(0, 20, (4, 6)))
