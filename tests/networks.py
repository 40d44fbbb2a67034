"""Small networks with odd graphs, for the tests of conversion."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LongSkip(nn.Module):
    """A skip across the middle that is concatenated, as in a U-net."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.merge = nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU())
        self.classifier = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x)
        high = self.up(self.middle(low))
        merged = F.relu(self.merge(torch.cat([low, high], dim=1)))
        return self.classifier(self.last(merged).mean((2, 3)))


class Shared(nn.Module):
    """One module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 64)
        self.block = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())
        self.middle = nn.Linear(64, 96)
        self.again = nn.Sequential(nn.Linear(96, 96), nn.Tanh())
        self.classifier = nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        x = x + self.block(x)
        x = self.middle(x)
        return self.classifier(x + self.again(self.again(x)))


class Dictionaries(nn.Module):
    """Dictionaries and lists between modules, a loop over shapes, and an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({"a": nn.Linear(12, 40), "b": nn.Linear(12, 24)})
        self.join = nn.Linear(64, 64)
        self.out = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 5)])

    def forward(self, x: Tensor, *, scale: float | None = None) -> Tensor:
        parts = {name: F.relu(branch(x)) for name, branch in self.branches.items()}
        x = self.join(torch.cat([parts["a"], parts["b"]], dim=-1))
        if scale is not None:
            x = x * scale
        for layer in self.out[:-1]:
            x = F.gelu(layer(x))
        assert x.shape[0] > 0
        return self.out[-1](x)


class TokenMixer(nn.Module):
    """Attention written by hand: fused queries, keys and values, reshapes with fixed sizes, a class token."""

    def __init__(self, dim: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv2d(3, dim, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(dim),
                    "qkv": nn.Linear(dim, 3 * dim),
                    "proj": nn.Linear(dim, dim),
                    "norm2": nn.LayerNorm(dim),
                    "fc1": nn.Linear(dim, 2 * dim),
                    "fc2": nn.Linear(2 * dim, dim),
                }
            )
            for _ in range(3)
        )
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for layer in self.layers:
            x = x + self.drop(self.attend(layer, layer["norm1"](x)))
            x = x + layer["fc2"](F.gelu(layer["fc1"](layer["norm2"](x))))
        return self.head(x[:, 0])

    def attend(self, layer: nn.ModuleDict, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        qkv = layer["qkv"](x).reshape(n, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(-1)
        out = F.dropout(weights, 0.1 if self.training else 0.0) @ v
        return layer["proj"](out.transpose(1, 2).reshape(n, length, dim))


class Volume(nn.Module):
    """3-d convolutions with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 16, 3, 2, 1), nn.BatchNorm3d(16), nn.ReLU())
        self.grouped = nn.Sequential(
            nn.Conv3d(16, 64, 1), nn.Conv3d(64, 64, 3, padding=1, groups=16), nn.GroupNorm(8, 64)
        )
        self.depthwise = nn.Sequential(nn.Conv3d(64, 64, 3, padding=1, groups=64), nn.Conv3d(64, 48, 1), nn.ReLU())
        self.classifier = nn.Linear(48, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.depthwise(self.grouped(self.stem(x))).flatten(2).mean(2))


class Recurrent(nn.Module):
    """An LSTM below a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 24, batch_first=True)
        self.gru = nn.GRU(24, 24, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4))

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(x)
        x, last = self.gru(x)
        return self.mlp(last[-1])


class Dense(nn.Module):
    """A map of predictions: one for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.decode = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 7, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.decode(self.encode(x)), size=x.shape[-2:], mode="bilinear")


def wave_net() -> nn.Module:
    """1-d convolutions."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 5), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 3, 2), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Conv1d(32, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


class SpreadOfBatch(nn.Module):
    """The last layers of a discriminator: with one example alone its outputs are no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(33, 32, 3, 2, 1)
        self.classifier = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        spread = x.std(0).mean().expand(len(x), 1, *x.shape[2:])
        return self.classifier(self.second(torch.cat([x, spread], 1)).relu().mean((2, 3)))


def perceptron() -> nn.Module:
    """A plain perceptron."""
    return nn.Sequential(
        nn.Linear(20, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 6)
    )


ODD = {
    "long skip": (LongSkip, (3, 16, 16)),
    "shared": (Shared, (12,)),
    "dictionaries": (Dictionaries, (12,)),
    "token mixer": (TokenMixer, (3, 16, 16)),
    "volume": (Volume, (3, 8, 8, 8)),
    "recurrent": (Recurrent, (7, 6)),
    "dense": (Dense, (3, 16, 16)),
    "1-d": (wave_net, (1, 40)),
    "perceptron": (perceptron, (20,)),
}


class Text(nn.Module):
    """Attention over words with a mask; of any length up to 64."""

    def __init__(self, dim: int = 32, layers: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, dim)
        self.position = nn.Parameter(torch.randn(64, dim) * 0.02)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "norm": nn.LayerNorm(dim), "mix": nn.Linear(dim, dim)})
            for _ in range(layers)
        )
        self.head = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, classes))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids) + self.position[: ids.shape[1]]
        hidden = (1 - mask.to(x.dtype))[:, None] * -1e4
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["norm"](x)).chunk(3, -1)
            x = x + layer["mix"]((q @ k.transpose(1, 2) / 8 + hidden).softmax(-1) @ v)
        shown = mask.to(x.dtype)[..., None]
        return self.head((x * shown).sum(1) / shown.sum(1).clamp(min=1))


class TwoAnswers(Text):
    """Named outputs, of which two can be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:  # pyright: ignore
        logits = super().forward(ids, mask)
        return {"logits": logits, "aux": self.aux(logits)}


class Graph(nn.Module):
    """Sums over neighbours: features of nodes, and edges that have no row for each of them."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, dim), nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        for layer in self.layers[:-1]:
            x = layer(x)
            x = F.relu(x + torch.zeros_like(x).index_add(0, target, x[source]) / 4)
        return self.layers[-1](x)


def text_batch(examples: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Words and a mask, the same every time."""
    generator = torch.Generator().manual_seed(examples * length)
    ids = torch.randint(50, (examples, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (examples, 1), generator=generator)
    return {"ids": ids, "mask": (torch.arange(length) < lengths).long()}


def graph_batch(nodes: int = 10, edges: int = 30) -> tuple[Tensor, Tensor]:
    """Nodes and edges, the same every time."""
    generator = torch.Generator().manual_seed(nodes * edges)
    return torch.randn(nodes, 8, generator=generator), torch.randint(nodes, (2, edges), generator=generator)


class Plain(nn.Sequential):
    """Without batch normalisation, whose statistics are of one process."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
