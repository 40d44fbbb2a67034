"""Networks by hand on tables, sets, graphs and points."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinds.entry import Entry


class PointNet(nn.Module):
    """A small network turns the points; 1-d convolutions and a maximum over them."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Conv1d(3, 16, 1), nn.ReLU(), nn.Conv1d(16, 32, 1), nn.ReLU())
        self.matrix = nn.Linear(32, 9)
        self.points = nn.Sequential(
            nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1), nn.BatchNorm1d(64), nn.ReLU()
        )
        self.out = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6))

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, points)
        n = x.size(0)
        identity = torch.eye(3, device=x.device).flatten().repeat(n, 1)
        matrix = (self.matrix(torch.max(self.turn(x), 2)[0]) + identity).view(-1, 3, 3)
        x = torch.bmm(x.transpose(2, 1), matrix).transpose(2, 1)
        return self.out(self.points(x).max(dim=2)[0])


class GraphConvolution(nn.Module):
    def __init__(self, inward: int, outward: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inward, outward)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        degree = torch.zeros(x.size(0), device=x.device).index_add(0, target, torch.ones_like(target, dtype=x.dtype))
        scale = (degree + 1).rsqrt()
        x = self.linear(x)
        messages = x[source] * (scale[source] * scale[target]).unsqueeze(-1)
        return x * scale.square().unsqueeze(-1) + torch.zeros_like(x).index_add(0, target, messages)


class GCN(nn.Module):
    """One large graph: a class for each node."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (GraphConvolution(a, b) for a, b in ((8, 32), (32, 32), (32, 4)))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = F.relu(self.first(x, edge_index))
        x = F.relu(self.second(x, edge_index))
        return self.third(x, edge_index)


class GATLayer(nn.Module):
    def __init__(self, inward: int, outward: int, heads: int) -> None:
        super().__init__()
        self.heads, self.outward = heads, outward
        self.linear = nn.Linear(inward, heads * outward, bias=False)
        self.source = nn.Parameter(torch.randn(1, heads, outward) * 0.1)
        self.target = nn.Parameter(torch.randn(1, heads, outward) * 0.1)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index[0], edge_index[1]
        x = self.linear(x).view(-1, self.heads, self.outward)
        score = (x * self.source).sum(-1)[source] + (x * self.target).sum(-1)[target]
        score = torch.exp(F.leaky_relu(score, 0.2))
        total = x.new_zeros(x.size(0), self.heads).index_add_(0, target, score)
        weight = score / (total[target] + 1e-9)
        out = torch.zeros_like(x).index_add_(0, target, x[source] * weight.unsqueeze(-1))
        return out.flatten(1)


class GAT(nn.Module):
    """Attention along edges, its softmax by index_add_."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GATLayer(8, 8, 4), GATLayer(32, 8, 4)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = F.elu(self.first(x, edge_index))
        return self.out(F.elu(self.second(x, edge_index)))


class GraphsInBatch(nn.Module):
    """Graphs in one batch, told apart by a vector; a class for each graph by a mean over its nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GraphConvolution(8, 32), GraphConvolution(32, 32)
        self.out = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, num_graphs: int = 4) -> Tensor:
        x = F.relu(self.first(x, edge_index))
        x = F.relu(self.second(x, edge_index))
        total = x.new_zeros(num_graphs, x.size(1)).index_add(0, batch, x)
        count = x.new_zeros(num_graphs).index_add(0, batch, torch.ones_like(batch, dtype=x.dtype))
        return self.out(total / count.clamp(min=1).unsqueeze(1))


class DenseGraph(nn.Module):
    """Adjacency matrices, one for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 32)])
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = adjacency + torch.eye(adjacency.shape[-1], device=x.device)
        scale = adjacency.sum(-1, keepdim=True).pow(-0.5)
        adjacency = adjacency * scale * scale.transpose(1, 2)
        for layer in self.layers:
            x = F.relu(torch.matmul(adjacency, layer(x)))
        return self.out(x.sum(dim=1))


class DLRM(nn.Module):
    """Numbers through a perceptron, categories through tables, and the products of all pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.tables = nn.ModuleList(nn.Embedding(size, 16) for size in (10, 20, 30))
        self.top = nn.Sequential(nn.Linear(16 + 6, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        vectors = [x, *(table(sparse[:, i]) for i, table in enumerate(self.tables))]
        stacked = torch.stack(vectors, dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        rows, columns = torch.tril_indices(stacked.shape[1], stacked.shape[1], offset=-1)
        return self.top(torch.cat([x, products[:, rows, columns]], dim=1)).squeeze(-1)


class WideAndDeep(nn.Module):
    """Each column an argument of its own; EmbeddingBag for a list of categories."""

    def __init__(self) -> None:
        super().__init__()
        self.city, self.tags = nn.Embedding(12, 8), nn.EmbeddingBag(20, 8, mode="mean")
        self.deep = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.out, self.wide = nn.Linear(32, 1), nn.Linear(4, 1)

    def forward(self, numbers: Tensor, city: Tensor, tags: Tensor) -> Tensor:
        x = torch.cat([numbers, self.city(city), self.tags(tags)], dim=1)
        return torch.sigmoid(self.out(self.deep(x)) + self.wide(numbers)).squeeze(1)


class TwoTowers(nn.Module):
    """Users and items; their dot product."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(50, 16), nn.Embedding(80, 16)
        self.user_tower = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        self.item_tower = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        u = F.normalize(self.user_tower(self.users(user)), dim=-1)
        v = F.normalize(self.item_tower(self.items(item)), dim=-1)
        return (u * v).sum(-1) * 5


class FactorisationMachine(nn.Module):
    """DeepFM: one table for all fields by offsets, pairwise products in one line, a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, 10, 20, 30]))
        self.embedding, self.linear = nn.Embedding(40, 12), nn.Embedding(40, 1)
        self.bias = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offsets
        vectors = self.embedding(x)  # (N, fields, 12)
        pairs = 0.5 * (vectors.sum(1).pow(2) - vectors.pow(2).sum(1)).sum(1, keepdim=True)
        return (self.linear(x).sum(1) + self.bias + pairs + self.mlp(vectors.flatten(1))).squeeze(1)


class TabularResNet(nn.Module):
    """Numbers and categories; residual blocks with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.categories = nn.ModuleList([nn.Embedding(5, 4), nn.Embedding(7, 4)])
        self.inward = nn.Linear(18, 48)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(48), nn.Linear(48, 96), nn.ReLU(), nn.Dropout(0.1), nn.Linear(96, 48))
            for _ in range(3)
        )
        self.out = nn.Sequential(nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 2))

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        parts = [x_num, *(embed(x_cat[:, i]) for i, embed in enumerate(self.categories))]
        x = self.inward(torch.cat(parts, dim=-1))
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


class FTTransformer(nn.Module):
    """Each column a token: numbers times a vector, categories by tables; a class token in front."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 32)), nn.Parameter(torch.randn(8, 32) * 0.1)
        self.register_buffer("offsets", torch.tensor([0, 5]))
        self.table = nn.Embedding(12, 32)
        self.token = nn.Parameter(torch.randn(32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        tokens = torch.cat([x_num.unsqueeze(-1) * self.weight, self.table(x_cat + self.offsets)], dim=1) + self.bias
        x = torch.cat([self.token.expand(len(x_num), 1, -1), tokens], dim=1)
        return self.out(self.encoder(x)[:, 0])


class DeepSets(nn.Module):
    """Elements one by one, a masked mean, and a network of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(5, 32), nn.ELU(), nn.Linear(32, 48), nn.ELU())
        self.rho = nn.Sequential(nn.Linear(48, 48), nn.ELU(), nn.Linear(48, 3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.phi(x).masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.rho(h.sum(1) / mask.sum(1, keepdim=True))


class SetAttention(nn.Module):
    """A set transformer: inducing points, and pooling by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(5, 32)
        self.points, self.seed = nn.Parameter(torch.randn(1, 6, 32)), nn.Parameter(torch.randn(1, 1, 32))
        self.a, self.b, self.c = (nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.norm = nn.LayerNorm(32)
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        points = self.points.expand(x.size(0), -1, -1)
        h, _ = self.a(points, x, x)
        x = x + self.b(x, h, h)[0]
        x = self.norm(x + self.mlp(x))
        pooled, _ = self.c(self.seed.expand(x.size(0), -1, -1), x, x)
        return self.out(pooled.squeeze(1))


class NeRF(nn.Module):
    """Positions and directions as sines; the input comes in again half way; colour and density."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.ModuleList([nn.Linear(27, 48), nn.Linear(48, 48)])
        self.after = nn.ModuleList([nn.Linear(75, 48), nn.Linear(48, 48)])
        self.density, self.feature = nn.Linear(48, 1), nn.Linear(48, 48)
        self.colour = nn.Sequential(nn.Linear(48 + 15, 24), nn.ReLU(), nn.Linear(24, 3), nn.Sigmoid())

    @staticmethod
    def encode(x: Tensor, octaves: int) -> Tensor:
        parts = [x]
        for i in range(octaves):
            parts += [torch.sin(2.0**i * x), torch.cos(2.0**i * x)]
        return torch.cat(parts, -1)

    def forward(self, position: Tensor, direction: Tensor) -> Tensor:
        encoded = self.encode(position, 4)
        x = encoded
        for layer in self.before:
            x = F.relu(layer(x))
        x = torch.cat([encoded, x], -1)
        for layer in self.after:
            x = F.relu(layer(x))
        colour = self.colour(torch.cat([self.feature(x), self.encode(direction, 2)], -1))
        return torch.cat([colour, F.softplus(self.density(x))], dim=-1)


class SplineLayer(nn.Module):
    """As in a KAN: each weight is a function, a sum of B-splines on a grid."""

    def __init__(self, inward: int, outward: int) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, 9).expand(inward, -1).contiguous())
        self.base = nn.Parameter(torch.randn(outward, inward) / math.sqrt(inward))
        self.spline = nn.Parameter(torch.randn(outward, inward, 6) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        grid, point = self.grid, x.unsqueeze(-1)
        bases = ((point >= grid[:, :-1]) & (point < grid[:, 1:])).to(x.dtype)
        for k in (1, 2):
            left = (point - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)]) * bases[:, :, :-1]
            right = (grid[:, k + 1 :] - point) / (grid[:, k + 1 :] - grid[:, 1:-k]) * bases[:, :, 1:]
            bases = left + right
        spline = F.linear(bases.view(x.size(0), -1), self.spline.view(self.spline.size(0), -1))
        return F.linear(F.silu(x), self.base) + spline


def kan() -> nn.Module:
    return nn.Sequential(SplineLayer(6, 24), SplineLayer(24, 24), SplineLayer(24, 3))


class RadialBasis(nn.Module):
    """Distances to learned centres."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Sequential(nn.Linear(6, 32), nn.Tanh())
        self.centres, self.log_scale = nn.Parameter(torch.randn(24, 32) * 0.5), nn.Parameter(torch.zeros(24))
        self.out = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        distance = (x.unsqueeze(1) - self.centres.unsqueeze(0)).pow(2).sum(-1).sqrt()
        return self.out(torch.exp(-((distance / self.log_scale.exp()) ** 2) / 8))


class TwoTasks(nn.Module):
    """A shared body, and an output for each task in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.a = nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 3))
        self.b = nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"a": self.a(x), "b": self.b(x), "features": x}


def edges(n: int, count: int) -> Tensor:
    return torch.randint(0, n, (2, count))


def mixed(n: int, numbers: int) -> dict[str, Tensor]:
    return {
        "x_num": torch.randn(n, numbers),
        "x_cat": torch.stack([torch.randint(0, 5, (n,)), torch.randint(0, 7, (n,))], 1),
    }


def in_batch(n: int, size: int) -> dict[str, Tensor]:
    batch = torch.arange(4).repeat_interleave(size)
    return {"x": torch.randn(4 * size, 8), "edge_index": edges(4 * size, 6 * size), "batch": batch}


def set_with_mask(n: int, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, size, 5), torch.arange(size) < torch.randint(1, size + 1, (n, 1))


TABLES = [
    Entry("PointNet", PointNet, lambda n, s: torch.randn(n, 3, s), 20, (12, 33)),
    Entry("GCN", GCN, lambda n, s: (torch.randn(3 * n, 8), edges(3 * n, s)), 40, (20, 55)),
    Entry("GAT", GAT, lambda n, s: {"x": torch.randn(3 * n, 8), "edge_index": edges(3 * n, s)}, 40, (20, 55)),
    Entry("graphs in one batch", GraphsInBatch, in_batch, 5, (3, 8)),
    Entry(
        "graphs as matrices", DenseGraph,
        lambda n, s: (torch.randn(n, s, 8), torch.randint(0, 2, (n, s, s)).float()), 7, (5, 11),
    ),
    Entry("DLRM", DLRM, lambda n, s: {"dense": torch.randn(n, 6), "sparse": torch.randint(0, 10, (n, 3))}),
    Entry(
        "wide and deep", WideAndDeep,
        lambda n, s: (torch.randn(n, 4), torch.randint(0, 12, (n,)), torch.randint(0, 20, (n, s))), 5, (3, 9),
    ),
    Entry(
        "two towers", TwoTowers,
        lambda n, s: {"user": torch.randint(0, 50, (n,)), "item": torch.randint(0, 80, (n,))},
    ),
    Entry("DeepFM", FactorisationMachine, lambda n, s: torch.randint(0, 10, (n, 4))),
    Entry("tabular ResNet", TabularResNet, mixed, 10),
    Entry("FT-Transformer", FTTransformer, mixed, 6),
    Entry("DeepSets, mask", DeepSets, set_with_mask, 9, (5, 14)),
    Entry("set transformer", SetAttention, lambda n, s: torch.randn(n, s, 5), 9, (5, 14)),
    Entry("NeRF", NeRF, lambda n, s: (torch.randn(n, 3), torch.randn(n, 3))),
    Entry("KAN", kan, lambda n, s: torch.randn(n, 6)),
    Entry("radial basis", RadialBasis, lambda n, s: torch.randn(n, 6)),
    Entry("two tasks", TwoTasks, lambda n, s: torch.randn(n, 8), output=["a", "b"]),
]  # fmt: skip
