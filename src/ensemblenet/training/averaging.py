"""Averages of the weights over a run."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

__all__ = ["AveragedWeights"]


class AveragedWeights(WeightAveraging):
    """Keeps an exponential moving average of weights and statistics; it is what is validated, tested and stored.

    The decay begins low and rises to its own value, (1 + t) / (10 + t) after t steps, so that the first weights are
    soon forgotten. In a checkpoint the average stands as `state_dict`, the weights in training as
    `current_model_state`.

    Args:
        decay: the share of the average that a step keeps, below 1.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema must be in [0, 1), got {decay}.")
        self.decay = decay
        super().__init__(multi_avg_fn=self._average)

    def _average(self, averages: list[Tensor], currents: list[Tensor], steps: Tensor) -> None:
        """Move averages of one dtype towards what they average; nothing waits for the GPU."""
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, currents)  # pyright: ignore[reportPrivateImportUsage]
            return
        kept = ((1 + steps) / (10 + steps)).clamp(max=self.decay)
        change = torch._foreach_sub(currents, averages)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(change, (1 - kept).to(averages[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(averages, change)  # pyright: ignore[reportPrivateImportUsage]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore average and weights; how the heads run may have changed with the checkpoint."""
        super().setup(trainer, pl_module, "fit")
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model, also where a resumed run had no step left."""
        self._copy_average_to_current(pl_module)
