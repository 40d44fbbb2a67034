"""Single operations in fused heads: values and gradients against those of looped heads, in double precision."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemblenet import EnsembleNet, convert, fuse

N, L, H, D = 3, 6, 2, 4  # examples, tokens, attention heads and the width of each


def assert_trains_alike(model: EnsembleNet, x: Tensor) -> list[str]:
    """Compare outputs and gradients; which operations ran by vmap or one head after another."""
    model, x = model.double().train(), x.double() if x.is_floating_point() else x
    fused = fuse(copy.deepcopy(model), x)
    for mode in (True, False):
        torch.testing.assert_close(fused.train(mode)(x, per_head=True), model.train(mode)(x, per_head=True))
    for network in (model, fused):
        network.train()(x).square().sum().backward()
    for (name, left), right in zip(model.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert fused.fusion is not None
    return [*fused.fusion.by_vmap, *fused.fusion.looped]


def by_hand(head: Callable[[], nn.Module], x: Tensor, features: int = 8) -> EnsembleNet:
    torch.manual_seed(0)
    return EnsembleNet(nn.Linear(x.shape[-1], features), [head() for _ in range(3)])


class Attend(nn.Module):
    """Attention with a mask of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.out = nn.Linear(8, 3 * H * D), nn.Linear(H * D, 5)
        if kind == "cross":
            self.query = nn.Parameter(torch.randn(1, H, 2, D))
        shapes = {"per head": (1, H, L, L), "for all": (L, L), "vectors": (H, L, L), "three": (N, L, L)}
        if kind in shapes:
            self.bias = nn.Parameter(torch.randn(shapes[kind]))
        self.register_buffer("shared", torch.randn(H, L, L))
        self.register_buffer("allowed", torch.ones(L, L).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        match self.kind:
            case "per head" | "for all" | "vectors":
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
            case "positional":
                out = F.scaled_dot_product_attention(q, k, v, self.shared, 0.0, False, scale=0.3)
            case "boolean":
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed)
            case "from features":  # a mask of each example, and of each head of the model
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=(x.sum(-1) * 3).reshape(n, 1, 1, length))
            case "causal":
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            case "grouped":
                out = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], self.shared, enable_gqa=True)
            case "one key":  # for all attention heads, by broadcasting
                out = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], self.allowed)
            case "cross":  # one query for all examples
                out = F.scaled_dot_product_attention(self.query, k, v)
            case "three":  # without a dimension for attention heads
                out = F.scaled_dot_product_attention(q[:, 0], k[:, 0], v.flatten(1, 1)[:, 1], attn_mask=self.bias[:1])
                return self.out(torch.cat([out, out], -1)).mean(1)
            case _:
                out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).flatten(2)).mean(1)


KINDS = (
    *("per head", "for all", "vectors", "positional", "boolean", "from features", "causal", "grouped", "cross"),
    *("one key", "three", "plain"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_attention(kind: str) -> None:
    x = torch.randn(N, L, 7)
    assert assert_trains_alike(by_hand(lambda: Attend(kind), x), x) == []


class Dropping(nn.Module):
    """Attention that drops weights in either mode; without parameters, all heads are the same but for chance."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.traceable = traceable
        self.register_buffer("bias", torch.zeros(L, L))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (H, D)).transpose(1, 2)
        if not self.traceable and x.sum() == 7:
            return x
        return F.scaled_dot_product_attention(x, x, x, self.bias, 0.5).transpose(1, 2).flatten(1)


@pytest.mark.parametrize("traceable", [True, False])
def test_attention_drops_weights_of_every_head_for_itself(traceable: bool) -> None:
    x = torch.randn(N, L, H * D)
    model = fuse(EnsembleNet(nn.Identity(), [Dropping(traceable) for _ in range(2)]), x)
    first, second = model(x, per_head=True)
    assert not torch.allclose(first, second)
    assert (model.fusion.looped == []) == traceable


def test_what_has_no_gradient_under_vmap_runs_one_head_after_another() -> None:
    """For a learned mask, PyTorch takes a kernel without a gradient inside of vmap."""

    class Untraced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(L, L))

        def forward(self, x: Tensor) -> Tensor:
            x = x.unsqueeze(1) if x.ndim == 3 else x
            return F.scaled_dot_product_attention(x, x, x, self.bias).mean(2)

    x = torch.randn(N, L, 7)
    assert len(assert_trains_alike(by_hand(Untraced, x), x)) == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beit_base_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}),
        ("vit_relpos_small_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    ],
)
def test_networks_with_a_learned_bias(name: str, options: dict) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = convert(timm.create_model(name, num_classes=4, **options), x, budget=0.9, split_at="input")
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):  # of the network that makes the bias
            layer.p = 0.0
    with torch.no_grad():  # biases begin as zeros, of which no mistake shows
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert assert_trains_alike(model, x) == []


class Joining(nn.Module):
    """Empty vectors among what is concatenated, which PyTorch passes over."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Conv1d(7, 8, 1), nn.Linear(8, 5), kind
        self.register_buffer("empty", torch.zeros(0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.transpose(1, 2))  # the fused form of a convolution has heads among the channels
        match self.kind:
            case "constant":
                x = torch.cat([torch.tensor([]), x], dim=1)
            case "of the features":
                x = torch.cat([x, x.new_zeros(0)], dim=-1)
            case "widening":
                x = torch.cat([self.empty, x, x], -2)[:, :8]
            case "several":
                x = torch.concat([torch.tensor([]), self.empty, x, x.relu(), torch.tensor([])], 2)
            case "empties alone":
                x = x + torch.cat([x.new_zeros(0), torch.tensor([])]).sum()
        return self.b(x.mean(-1))


@pytest.mark.parametrize("kind", ["constant", "of the features", "widening", "several", "empties alone"])
def test_empty_vectors_are_passed_over(kind: str) -> None:
    x = torch.randn(N, L, 7, dtype=torch.float64)
    without_rule = assert_trains_alike(convert(Joining(kind).double(), x, 3, 4.0, "input"), x)
    assert set(without_rule) <= {"new_zeros"}


class Widened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("empty", torch.zeros(0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.empty, self.layer(x)], 1)


def test_an_empty_vector_widens_the_type_as_it_does_in_one_head() -> None:
    model, x = EnsembleNet(nn.Identity(), [Widened() for _ in range(2)]), torch.randn(N, 4)
    fused = fuse(model, x)
    assert fused(x, per_head=True).dtype == model(x, per_head=True).dtype == torch.float64
    assert (fused.fusion.by_vmap, fused.fusion.looped) == ([], [])


class Spectral(nn.Module):
    """Complex weights, as global filters and Fourier operators have them."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(7, 4, dtype=torch.cfloat))
        self.stem, self.mix = nn.Conv1d(7, 32, 1), nn.Parameter(torch.randn(32, 4, dtype=torch.cfloat))
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=L))
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.mix, n=L).relu().mean(-1))


@pytest.mark.parametrize("split_at", ["input", "fft_irfft"])
def test_complex_parameters(split_at: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(N, 7, L)
    model = convert(Spectral(), x, 2, 2.0, split_at=split_at)
    fused = fuse(copy.deepcopy(model))  # in single precision, by the example that the recipe gives
    torch.testing.assert_close(fused(x), model(x))
    for network in (model, fused):
        network(x).square().sum().backward()
    for left, right in zip(model.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad, rtol=1e-4, atol=1e-5)
