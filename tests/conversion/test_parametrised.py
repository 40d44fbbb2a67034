"""Weights that are computed from others, and kernels that are fixed."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

from ensemblenet import ConversionError, convert
from ensemblenet.conversion.build import design_head
from ensemblenet.conversion.split import find_cuts
from ensemblenet.conversion.trace import trace
from ensemblenet.testing import check_conversion, check_full_width

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def perceptron(change: Callable[[nn.Module], object]) -> nn.Sequential:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5))
    change(base[0])
    change(base[2])
    return base


NARROWED: dict[str, Callable[[nn.Module], object]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm, by hooks": utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm, by hooks": utils.spectral_norm,
    "pruned for good": lambda layer: prune.remove(prune.l1_unstructured(layer, "weight", 0.5), "weight"),  # type: ignore[arg-type]
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", NARROWED)
def test_computed_weights_are_narrowed_whether_the_base_has_run_or_not(name: str) -> None:
    base = perceptron(NARROWED[name])
    assert check_conversion(base, X, budget=0.9, split_at="input").width > 0.6
    with torch.no_grad():
        base(X)
    check_full_width(base, X, "0")


@pytest.mark.parametrize("init", ["fresh", "inherit"])
@pytest.mark.parametrize("change", [parametrizations.spectral_norm, utils.spectral_norm])
def test_narrowed_spectral_norms_are_one(change: Callable[[nn.Module], nn.Module], init: str) -> None:
    base = perceptron(change)
    base.train()(X)
    model = convert(base, X, budget=0.9, split_at="input", init=init).eval()  # type: ignore[arg-type]
    model(X)
    for head in model.heads:
        norm = torch.linalg.matrix_norm(head.get_submodule("2").weight, ord=2).item()
        assert norm == pytest.approx(1, rel=0.1)


def test_pruned_layers_are_refused_by_name() -> None:
    base = perceptron(lambda layer: prune.l1_unstructured(layer, "weight", 0.5))
    with pytest.raises(ConversionError, match=r"weight of 0 \(Linear\) is pruned.*prune\.remove"):
        convert(base, X)


def test_what_keeps_the_width_is_named() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cummin(1).values

    base = perceptron(lambda layer: None)
    base[3] = Sorted()
    base[2] = parametrizations.orthogonal(base[2])
    traced = trace(base, X)
    keepers = design_head(traced, find_cuts(traced)[0], set()).keepers()
    assert any("in 2 (ParametrizedLinear)" in keeper for keeper in keepers)
    assert any(keeper.startswith("cummin in 3 (Sorted) at test_parametrised.py:") for keeper in keepers)
    plain = trace(perceptron(lambda layer: None), X)
    assert design_head(plain, find_cuts(plain)[0], set()).keepers() == []


class Blur(nn.Module):
    """A fixed kernel, of one channel or one for each, applied to every channel, as in BlurPool."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernel", kernel)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.expand(64, 1, 3, 3) if self.kernel.ndim == 2 else self.kernel  # type: ignore[operator]
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=x.shape[1])  # type: ignore[arg-type]


BINOMIAL = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16


@pytest.mark.parametrize("kernel", [BINOMIAL, BINOMIAL.expand(64, 1, 3, 3).clone()], ids=["one", "of each channel"])
def test_fixed_kernels_stay_as_they_are_and_follow_their_channels(kernel: Tensor) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), Blur(kernel), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 5, 1))
    check_full_width(base, IMAGES, "0")
    assert check_conversion(base, IMAGES, budget=0.9, split_at="input").width < 0.9
    for head in convert(base, IMAGES, budget=0.9, split_at="input").heads:
        (kept,) = (buffer for name, buffer in head.named_buffers() if "kernel" in name)
        torch.testing.assert_close(kept.reshape(-1, 3, 3), BINOMIAL.expand(kept.numel() // 9, 3, 3))


def test_a_bank_of_fixed_filters_gives_each_head_some_of_its_filters() -> None:
    class Filters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bank", torch.randn(64, 3, 5, 5))
            self.next, self.last = nn.Conv2d(64, 64, 1), nn.Conv2d(64, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.next(F.conv2d(x, self.bank, padding=2).relu()).relu())  # type: ignore[arg-type]

    torch.manual_seed(0)
    base = Filters()
    bank = {tuple(row) for row in base.bank.flatten(1).tolist()}  # type: ignore[operator]
    for head in convert(copy.deepcopy(base), IMAGES, budget=0.9, split_at="input").heads:
        chosen = {tuple(row) for row in head.get_buffer("bank").flatten(1).tolist()}
        assert chosen < bank
        assert len(chosen) == head.get_submodule("next").in_channels
