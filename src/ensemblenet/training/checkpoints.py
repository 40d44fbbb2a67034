"""How checkpoints of a run are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from ensemblenet.errors import TrainingError
from ensemblenet.storage.atomic import atomic_path

__all__ = ["AtomicCheckpointIO"]


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
