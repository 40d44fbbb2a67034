"""Hugging Face's Trainer: it wants a model that returns its own loss, so a few lines put model and loss together."""

import tempfile

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import ensemblenet
from ensemblenet.functional import combine_heads


class WithLoss(nn.Module):
    """A multi-headed model that returns loss and logits, as transformers' models do."""

    def __init__(self, model: ensemblenet.EnsembleNet) -> None:
        super().__init__()
        self.model = model
        self.criterion = ensemblenet.CoDistillationLoss(weight=2.0, combine=model.combine)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Inputs (N, *), labels (N,)."""
        heads = self.model(inputs, per_head=True)
        return {"loss": self.criterion(heads, labels), "logits": combine_heads(heads, self.model.combine)}


torch.manual_seed(0)
y = torch.randint(10, (4000,))
x = torch.randn(10, 32)[y] + torch.randn(4000, 32)  # ten made-up prototypes under noise
examples = [{"inputs": inputs, "labels": label} for inputs, label in zip(x, y, strict=True)]
base = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        WithLoss(ensemblenet.convert(base, x[:2], num_heads=3)),
        TrainingArguments(
            folder, num_train_epochs=2, per_device_train_batch_size=64, learning_rate=3e-3, warmup_steps=10,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=examples[:3000],
        eval_dataset=examples[3000:],
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(1) == result.label_ids).mean()},
    )  # fmt: skip
    trainer.train()
    print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")
