"""A run of `fit` that takes seconds, and what it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed_everything": 3,
    "model": {
        "base": {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}},
        "conversion": {"num_heads": 2, "budget": 1.0},
        "heads": "looped",
    },
    "data": {
        "class_path": "ensemblenet.data.MNIST1D",
        "init_args": {"num_train": 100, "num_val": 20, "num_test": 50, "batch_size": 20},
    },
}
"""Settings of 5 steps an epoch; the trainer's are missing."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's last checkpoint."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
