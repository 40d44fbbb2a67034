"""The pieces of timm's training script: its optimizers, schedules, mixup and EMA, with the co-distillation loss."""

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

import ensemblenet

torch.manual_seed(0)
prototypes = torch.randn(10, 3, 32, 32)


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up images: ten prototypes under noise."""
    y = torch.randint(10, (size,))
    return prototypes[y] + torch.randn(size, 3, 32, 32), y


steps = 50
base = timm.create_model("test_resnet", num_classes=10)
model = ensemblenet.convert(base, batch(2)[0], num_heads=2, budget=0.95)
optimizer = create_optimizer_v2(model, opt="lamb", lr=1e-2, weight_decay=0.02)
schedule, _ = create_scheduler_v2(
    optimizer, sched="cosine", num_epochs=1, step_on_epochs=False, updates_per_epoch=steps
)
mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=1.0, prob=0.5, label_smoothing=0.1, num_classes=10)
criterion = ensemblenet.CoDistillationLoss(weight=2.0)  # takes mixup's soft targets (N, C) as they are
ema = ModelEmaV3(model, decay=0.9)

for step in range(steps):
    x, target = mixup(*batch(64))
    loss = criterion(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update(model, step=step)
    schedule.step_update(step + 1)

averaged = ema.module.eval()  # an EnsembleNet too
x, y = batch(1000)
with torch.inference_mode():
    print(f"accuracy: {(averaged(x).argmax(1) == y).float().mean():.3f}")
