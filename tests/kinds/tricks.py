"""Networks by hand whose weights, gradients, precision or control flow are unusual."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from kinds.entry import Entry


class Experts(nn.Module):
    """All experts run; a gate mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 32)
        self.gate = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)) for _ in range(4))
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        weights = F.softmax(self.gate(x), dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.out(x + torch.einsum("ne,nec->nc", weights, outputs))


class TopExperts(Experts):
    """The two best experts of each example count; all run, the others' weights are zero."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        scores = self.gate(x)
        best, index = scores.topk(2, dim=-1)
        weights = torch.zeros_like(scores).scatter(1, index, F.softmax(best, dim=-1))
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.out(x + (weights.unsqueeze(-1) * outputs).sum(1))


class RoutedExperts(Experts):
    """Each expert runs on the examples that chose it: shapes that depend on values."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        weights, chosen = F.softmax(self.gate(x), dim=-1).topk(2, dim=-1)
        total = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == k)
            if rows.numel():
                total.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
        return self.out(x + total)


def normed() -> nn.Module:
    """weight_norm as a parametrization."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 48)), nn.ReLU(), parametrizations.weight_norm(nn.Linear(48, 48)),
        nn.ReLU(), parametrizations.weight_norm(nn.Linear(48, 3)),
    )  # fmt: skip


def old_weight_norm() -> nn.Module:
    """torch.nn.utils.weight_norm, by hooks."""
    make = torch.nn.utils.weight_norm
    return nn.Sequential(make(nn.Linear(8, 48)), nn.ReLU(), make(nn.Linear(48, 48)), nn.ReLU(), nn.Linear(48, 3))


def spectral() -> nn.Module:
    """A discriminator with spectral norms."""
    norm = parametrizations.spectral_norm
    return nn.Sequential(
        norm(nn.Conv2d(3, 16, 4, 2, 1)), nn.LeakyReLU(0.2), norm(nn.Conv2d(16, 32, 4, 2, 1)), nn.LeakyReLU(0.2),
        nn.Flatten(), norm(nn.Linear(32 * 16, 1)),
    )  # fmt: skip


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


def monotone() -> nn.Module:
    """A parametrization of the user's own: weights that are positive."""
    layers = [nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)]
    for layer in layers[::2]:
        parametrize.register_parametrization(layer, "weight", Positive())
    return nn.Sequential(*layers)


class LoRALinear(nn.Module):
    """A frozen layer and a product of two narrow ones that is learned."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.B = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * (x @ self.A.T @ self.B.T)


def lora() -> nn.Module:
    return nn.Sequential(
        LoRALinear(nn.Linear(8, 48)), nn.GELU(), LoRALinear(nn.Linear(48, 48)), nn.GELU(), nn.Linear(48, 3)
    )


def unfrozen_lora() -> nn.Module:
    """The same, all of it learned: what the refusal proposes."""
    return lora().requires_grad_(True)


class FrozenBackbone(nn.Module):
    """The backbone runs without gradients, in evaluation mode; only the classifier learns."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.backbone.requires_grad_(False)
        self.classifier = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))

    def train(self, mode: bool = True) -> FrozenBackbone:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.classifier(x)


def halved() -> nn.Module:
    """A network in bfloat16."""
    return nn.Sequential(
        nn.Linear(8, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3)
    ).to(torch.bfloat16)  # fmt: skip


class Doubled(nn.Module):
    """Inputs of float64, a table of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Autocast(nn.Module):
    """A part of the network runs in bfloat16, the rest in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64)), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.first(x)
        return self.last(torch.relu(x.float()))


def compiled() -> nn.Module:
    """torch.compile around a network, as a training script leaves it."""
    return torch.compile(
        nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)), backend="eager"
    )


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * gradients[0], None


class GradientReversal(nn.Module):
    """Domain adaptation: the domain's gradient is turned before the features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.label = nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 4))
        self.domain = nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        return self.label(x), self.domain(_Reverse.apply(x, 0.7))


class Quantised(nn.Module):
    """A code book with a straight-through gradient; the second output teaches the codes."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 16))
        self.codes = nn.Embedding(12, 16)
        self.decode = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encode(x)
        nearest = self.codes(torch.cdist(code, self.codes.weight).argmin(dim=-1))
        return self.decode(code + (nearest - code).detach()), nearest - code.detach()


class Binary(nn.Module):
    """Signs forward, a clipped identity backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 48), nn.Linear(48, 48)])
        self.out = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            soft = x.clamp(-1, 1)
            x = (torch.sign(x) - soft).detach() + soft
        return self.out(x)


class LayerDrop(nn.Module):
    """Whole layers are passed over by chance in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4)
        )
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            if self.training and random.random() < 0.3:
                continue
            x = x + layer(x)
        return self.out(x)


class StochasticDepth(LayerDrop):
    """What LayerDrop does, for each example by a mask: what the refusal proposes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            keep = F.dropout(x.new_ones(x.shape[0], 1), 0.3, self.training)
            x = x + layer(x) * keep
        return self.out(x)


class TiedAutoEncoder(nn.Module):
    """The decoder's weights are the encoder's, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 48), nn.Linear(48, 12)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(48)), nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.relu(self.second(torch.relu(self.first(x))))
        x = torch.relu(F.linear(code, self.second.weight.t(), self.bias1))
        return F.linear(x, self.first.weight.t(), self.bias2)


class HyperNetwork(nn.Module):
    """A network makes the weights of another, one set for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 6 * 16 + 16))
        self.out = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        weights = self.hyper(context)
        matrix, bias = weights[:, :96].view(-1, 16, 6), weights[:, 96:]
        return self.out(torch.relu(torch.baddbmm(bias.unsqueeze(-1), matrix, x.unsqueeze(-1)).squeeze(-1)))


class CachedMask(nn.Module):
    """A causal mask that is made once for a length, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(6, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.out = nn.Linear(32, 3)
        self.cache: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length not in self.cache:
            self.cache[length] = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.inward(x)
        x = x + self.attention(x, x, x, attn_mask=self.cache[length], need_weights=False)[0]
        return self.out((x + self.mlp(x)).mean(1))


class TemperatureByEpoch(nn.Module):
    """A number that the training loop changes between epochs, kept as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.tensor(0.7))
        self.layers = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) / self.temperature


class WeightStandardised(nn.Conv2d):
    """A convolution whose kernels have mean 0 and deviation 1."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def standardised() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU()]
    layers += [WeightStandardised(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.ReLU(), WeightStandardised(32, 32, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


class EarlyExits(nn.Module):
    """A classifier behind each stage; a list of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(a, 48), nn.ReLU()) for a in (8, 48, 48))
        self.exits = nn.ModuleList(nn.Linear(48, 3) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for stage, leave in zip(self.stages, self.exits, strict=True):
            x = stage(x)
            outputs.append(leave(x))
        return outputs


class Halting(nn.Module):
    """Steps until the state's norm is small: the number of steps depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.step, self.out = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for _ in range(8):
            new = torch.tanh(self.step(x))
            if (new - x).norm() < 1e-3:
                break
            x = new
        return self.out(x)


class EightSteps(Halting):
    """The same with a fixed number of steps: what the refusal proposes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for _ in range(8):
            x = torch.tanh(self.step(x))
        return self.out(x)


def numbers(n: int, _: int) -> Tensor:
    return torch.randn(n, 8)


def pictures(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size)


TRICKS = [
    Entry("experts, dense", Experts, numbers),
    Entry("experts, top two", TopExperts, numbers),
    Entry("experts, routed", RoutedExperts, numbers, way=TopExperts),
    Entry("weight norm", normed, numbers),
    Entry("weight norm by hooks", old_weight_norm, numbers),
    Entry("spectral norm", spectral, lambda n, s: torch.randn(n, 3, 16, 16)),
    Entry("positive weights", monotone, lambda n, s: torch.randn(n, 6)),
    Entry("LoRA", lora, numbers, way=unfrozen_lora),
    Entry(
        "frozen backbone",
        FrozenBackbone,
        pictures,
        16,
        (24,),
        options={"init": "inherit", "split_at": "backbone"},
    ),
    Entry("bfloat16", halved, lambda n, s: torch.randn(n, 8, dtype=torch.bfloat16), tolerance=0.05),
    Entry("float64", Doubled, lambda n, s: torch.randn(n, 8, dtype=torch.float64)),
    Entry("autocast inside", Autocast, numbers, tolerance=0.02),
    Entry("torch.compile", compiled, numbers),
    Entry("gradient reversal", GradientReversal, numbers, output=[0, 1]),
    Entry("quantiser", Quantised, numbers, output=[0, 1]),
    Entry("signs", Binary, numbers),
    Entry("layer drop", LayerDrop, numbers, way=StochasticDepth),
    Entry("stochastic depth", StochasticDepth, numbers),
    Entry("tied autoencoder", TiedAutoEncoder, lambda n, s: torch.randn(n, 16)),
    Entry("hypernetwork", HyperNetwork, lambda n, s: (torch.randn(n, 6), torch.randn(n, 4))),
    Entry("mask in a cache", CachedMask, lambda n, s: torch.randn(n, s, 6), 10, (6, 14)),
    Entry("temperature in a buffer", TemperatureByEpoch, numbers),
    Entry("weight standardisation", standardised, pictures, 16, (24,)),
    Entry("early exits", EarlyExits, numbers, output=[0, 1, 2]),
    Entry("halting", Halting, numbers, way=EightSteps),
]
