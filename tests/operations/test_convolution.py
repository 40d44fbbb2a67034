"""Convolutions of all heads at once, against grouped ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemblenet import EnsembleNet, fuse
from ensemblenet.operations import convolution
from ensemblenet.operations.convolution import pointwise_products
from ensemblenet.operations.fusion import fold, unfold

GROUPED = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("few", [0, 2**18])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2), (2,), (1, 2, 1)])
def test_pointwise_products_are_a_grouped_convolution(
    stride: tuple[int, ...], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "_FEW", few)  # weights have few gradients or many
    torch.manual_seed(0)
    x = channels_last(made(2, 3 * 4, *(3, 4, 2)[: len(stride)])).requires_grad_()
    weight, bias = made(3, 5, 4, *(1 for _ in stride)).requires_grad_(), made(3, 5).requires_grad_()

    def products(*tensors: Tensor) -> Tensor:
        return pointwise_products(*tensors, stride)

    expected = GROUPED[len(stride)](x, weight.flatten(0, 1), bias.flatten(), stride=stride, groups=3)
    got = products(x, weight, bias)
    torch.testing.assert_close(got, expected)
    assert got.movedim(1, -1).is_contiguous()
    torch.testing.assert_close(torch.compile(products, backend="eager", fullgraph=True)(x, weight, bias), expected)
    assert torch.autograd.gradcheck(products, (x, weight, bias))
    assert torch.autograd.gradgradcheck(products, (x, weight, bias))


def test_heads_whose_pointwise_convolutions_are_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; padding, kernels and groups that are no products stay convolutions."""
    used: list[Tensor] = []

    def products(x: Tensor, *others: object) -> Tensor:
        used.append(x)
        return pointwise_products(x, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(convolution, "_suits_products", lambda x: True)
    monkeypatch.setattr(convolution, "pointwise_products", products)
    torch.manual_seed(0)
    heads = [
        nn.Sequential(
            nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1, stride=2, bias=False), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 6, 1, padding=1),
            nn.Conv2d(6, 6, 1, padding="same"), nn.Flatten(),
        )
        for _ in range(3)
    ]  # fmt: skip
    model = EnsembleNet(nn.Conv2d(3, 6, 3), heads).double().to(memory_format=torch.channels_last)
    fused, x = fuse(copy.deepcopy(model)), channels_last(made(2, 3, 12, 12))
    for network in (model, fused):
        network(x).square().mean().backward()
    torch.testing.assert_close(fused(x), model(x))
    for one, other in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert [x.shape[1] // 3 for x in used] == [8, 6] * 2  # the first convolution reads what all heads share


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6), (2, 3, 4, 5, 6, 7)])
def test_folding_keeps_channels_last(shape: tuple[int, ...]) -> None:
    x = made(*shape)
    expected = x.transpose(0, 1).flatten(1, 2)
    assert torch.equal(fold(x), expected)
    last = x.movedim(2, -1).contiguous().movedim(-1, 2)
    assert torch.equal(fold(last), expected)
    assert fold(last).movedim(1, -1).is_contiguous()
    assert fold(unfold(expected, 2)).data_ptr() == expected.data_ptr()
    again = channels_last(expected)
    assert fold(unfold(again, 2)).data_ptr() == again.data_ptr()
