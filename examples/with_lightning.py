"""A LightningModule of one's own, with metrics of the ensemble and of its heads."""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ensemblenet
from ensemblenet.metrics import HeadMetrics


class Digits(lightning.LightningModule):
    """Trains a converted network."""

    def __init__(self, base: nn.Module, example: Tensor, num_heads: int = 3) -> None:
        super().__init__()
        self.model = ensemblenet.convert(base, example, num_heads)
        self.criterion = ensemblenet.CoDistillationLoss(weight=2.0)
        self.metrics = HeadMetrics(num_classes=10, num_heads=num_heads, prefix="val/")

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One step."""
        x, y = batch
        return self.criterion(self.model(x), y)  # (K, N, C) in training

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """One batch."""
        x, y = batch
        self.metrics.update(self.model(x, per_head=True), y)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy, calibration and how far the heads differ."""
        self.log_dict(self.metrics.compute())
        self.metrics.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As ever."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


lightning.seed_everything(0, verbose=False)
y = torch.randint(10, (4000,))
x = torch.randn(10, 32)[y] + torch.randn(4000, 32)  # ten made-up prototypes under noise
train, val = TensorDataset(x[:3000], y[:3000]), TensorDataset(x[3000:], y[3000:])
base = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
trainer = lightning.Trainer(
    max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(Digits(base, x[:2]), DataLoader(train, 64, shuffle=True), DataLoader(val, 500))
print(f"one head: {trainer.callback_metrics['val/head_accuracy']:.3f}")
print(f"accuracy: {trainer.callback_metrics['val/accuracy']:.3f}")
