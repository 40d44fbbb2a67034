"""Anytime use: stop after as many heads as an example needs, and see what accuracy that costs."""

import torch

import ensemblenet
from ensemblenet.data.mnist1d import generate_mnist1d
from ensemblenet.heads.anytime import confident, heads_agree, predict_anytime
from ensemblenet.models import MNIST1DNet

torch.manual_seed(0)
(x, y), (test_x, test_y) = generate_mnist1d((4000, 5000))  # generated here: no download

model = ensemblenet.convert(MNIST1DNet(), x[:2], num_heads=4, split_at="input")
criterion = ensemblenet.CoDistillationLoss(weight=2.0)
epochs, steps = 8, 40
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * steps)

model.train()
for _ in range(epochs):
    for rows in torch.randperm(len(x)).split(100):
        loss = criterion(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

model.eval()
rules = {
    "heads agree": heads_agree(),
    **{f"confidence {threshold}": confident(threshold) for threshold in (0.3, 0.5, 0.7, 0.9)},
    "own: a clear margin": lambda z: z.mean(0).topk(2, 1).values.diff(dim=1)[:, 0] < -2,  # z is (k, n, C)
    "all heads": lambda z: torch.zeros(z.shape[1], dtype=torch.bool),
}
print(f"{'stop where':22}{'heads':>6}{'MACs':>9}{'right':>8}")
for name, rule in rules.items():
    result = predict_anytime(model, test_x, rule)
    accuracy = (result.outputs.argmax(1) == test_y).float().mean()
    print(f"{name:22}{result.heads_used.float().mean():6.2f}{result.macs:9,.0f}{accuracy:8.3f}")
print(f"accuracy: {accuracy:.3f}")
