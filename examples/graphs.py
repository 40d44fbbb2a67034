"""A graph network: two tensors in, of which only one has a row for each node."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ensemblenet


class GCN(nn.Module):
    """Graph convolutions (Kipf and Welling 2017), each a linear layer and a mean over neighbours."""

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        sizes = [features, hidden, hidden, classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Features of nodes (N, D) and edges from row 0 to row 1, (2, E), to logits (N, C)."""
        source, target = edge_index
        degree = 1 + torch.zeros_like(x[:, 0]).index_add(0, target, torch.ones_like(source, dtype=x.dtype))
        for index, layer in enumerate(self.layers):
            x = layer(x)
            x = (x + torch.zeros_like(x).index_add(0, target, x[source])) / degree[:, None]
            x = F.relu(x) if index < len(self.layers) - 1 else x
        return x


torch.manual_seed(0)
y = torch.randint(5, (1000,))  # five groups of nodes, whose features say little and whose neighbours say more
x = torch.randn(5, 16)[y] + 4 * torch.randn(1000, 16)
pairs = torch.randint(1000, (2, 40_000))
is_friend = (y[pairs[0]] == y[pairs[1]]) | (torch.rand(40_000) < 0.2)
edge_index = pairs[:, is_friend]
is_train = torch.rand(1000) < 0.5

model = ensemblenet.convert(GCN(16, 64, 5), (x, edge_index), num_heads=3)
criterion = ensemblenet.CoDistillationLoss(weight=2.0)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(60):
    outputs = model.train()(x, edge_index)  # (K, N, C)
    loss = criterion(outputs[:, is_train], y[is_train])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    right = model.eval()(x, edge_index).argmax(1) == y
print(f"accuracy: {right[~is_train].float().mean():.3f}")
few, some = torch.arange(200), (edge_index < 200).all(0)  # a model takes graphs of any size
assert model(x[few], edge_index[:, some]).shape == (200, 5)
