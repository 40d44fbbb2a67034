"""A loop of one's own in plain PyTorch: two lines change, the model and the loss."""

import torch
from torch import nn

import ensemblenet

torch.manual_seed(0)
prototypes = torch.randn(10, 1, 12, 12)


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up images (N, 1, 12, 12): ten prototypes under noise."""
    y = torch.randint(10, (size,))
    return prototypes[y] + 1.5 * torch.randn(size, 1, 12, 12), y


base = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 64, 3, 2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Conv2d(64, 64, 3, 2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Flatten(), nn.Linear(64 * 9, 10),
)  # fmt: skip

model = ensemblenet.convert(base, batch(2)[0], num_heads=3, budget=0.95)  # was: model = base
criterion = ensemblenet.CoDistillationLoss(weight=2.0)  # was: nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)

model.train()
for _ in range(60):
    x, y = batch(64)
    loss = criterion(model(x), y)  # in training, model(x) is (K, N, C)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

model.eval()
x, y = batch(2000)
with torch.inference_mode():
    heads = (model(x, per_head=True).argmax(2) == y).float().mean(1)  # (K,)
    accuracy = (model(x).argmax(1) == y).float().mean()  # in evaluation, model(x) is (N, C)
print("heads:", ", ".join(f"{value:.3f}" for value in heads))
print(f"accuracy: {accuracy:.3f}")
