"""How checkpoints of a run are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from ensemblenet.errors import TrainingError
from ensemblenet.storage.atomic import atomic_path

__all__ = ["AtomicCheckpointIO", "RunCheckpoint"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves a checkpoint under another name first, so that a kill leaves the last one whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save a Lightning checkpoint.

        Raises:
            TrainingError: it cannot be written, as on a full disk.
        """
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(Path(path)) as unfinished:
                torch.save(checkpoint, unfinished)
        except (OSError, RuntimeError) as error:  # torch.save raises either
            raise TrainingError(
                f"The checkpoint {path} cannot be written: {error}. The last good one is kept: free some space and go "
                f"on with `ensemblenet fit --resume {Path(path).parents[1]}`."
            ) from error


class RunCheckpoint(ModelCheckpoint):
    """The run's own: its state in a checkpoint has another name than that of a user's ModelCheckpoint."""

    @property
    def state_key(self) -> str:
        """What its state is called."""
        return f"run's {super().state_key}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to keep a state from which the run could not go on."""
        super().on_train_start(trainer, pl_module)
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        goes_on = hasattr(trainer.train_dataloader, "state_dict") or is_overridden("state_dict", data)
        if self._every_n_train_steps and not goes_on:
            raise TrainingError(
                "checkpoint_steps needs data that can go on in the middle of an epoch, such as ImageData; leave it out."
            )
