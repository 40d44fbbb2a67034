"""Hugging Face Accelerate: `accelerate launch examples/with_accelerate.py` runs it on any number of devices."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ensemblenet

torch.manual_seed(0)
y = torch.randint(10, (4000,))
x = torch.randn(10, 32)[y] + torch.randn(4000, 32)  # ten made-up prototypes under noise
loader = DataLoader(TensorDataset(x[:3000], y[:3000]), batch_size=64, shuffle=True)
val_loader = DataLoader(TensorDataset(x[3000:], y[3000:]), batch_size=250)

accelerator = Accelerator()
base = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
model = ensemblenet.convert(base, x[:2], num_heads=3)  # before prepare: DDP wraps what it is given
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=2 * len(loader))
criterion = ensemblenet.CoDistillationLoss(weight=2.0)
model, optimizer, schedule, loader, val_loader = accelerator.prepare(model, optimizer, schedule, loader, val_loader)

for _ in range(2):
    model.train()
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            accelerator.backward(criterion(model(inputs), targets))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

model.eval()
right = []
for inputs, targets in val_loader:
    with torch.inference_mode():
        predictions = model(inputs).argmax(1)
    predictions, targets = accelerator.gather_for_metrics((predictions, targets))  # no example twice
    right.append(predictions == targets)
accelerator.print(f"accuracy: {torch.cat(right).float().mean():.3f}")
ready = accelerator.unwrap_model(model)  # an EnsembleNet again: ensemblenet.save(ready, ...)
accelerator.print(f"heads: {ready.num_heads}")
