"""How checkpoints of a run are written."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from ensemblenet.errors import TrainingError, first_line
from ensemblenet.storage.atomic import atomic_path
from ensemblenet.storage.bucket import push
from ensemblenet.storage.runs import CHECKPOINT
from ensemblenet.training.processes import is_first_process
from ensemblenet.weights import damaged_part

__all__ = ["AtomicCheckpointIO", "RunCheckpoint", "goes_on_within_epochs", "whole_checkpoint"]

_BEFORE = CHECKPOINT.with_stem("previous")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves a checkpoint under another name first, so that a kill leaves the last one whole, and the one before."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save a Lightning checkpoint, in a bucket, too, if the run is kept in one.

        Raises:
            TrainingError: it cannot be written, as on a full disk; or another machine has gone on with the run.
            FetchError: the bucket's server fails for longer than the deadline.
        """
        path = Path(path)
        try:
            with atomic_path(path) as unfinished:
                torch.save(checkpoint, unfinished)
                if path.parts[-2:] == CHECKPOINT.parts and path.exists():
                    path.replace(path.with_name(_BEFORE.name))
        except OSError as error:
            kept = "The last good one is kept; see" if any(path.parent.glob("*.ckpt")) else "See"
            raise TrainingError(
                f"The checkpoint {path} cannot be written: {error.strerror}. {kept} that there is space."
            ) from error
        push(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Load one: tensors and plain data, and nothing else.

        Raises:
            TrainingError: it holds something else.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except pickle.UnpicklingError as error:  # PyTorch's message advises to run what it holds
            raise TrainingError(
                f"{path} holds more than tensors and plain data, which is never loaded: it is no checkpoint of `fit`."
            ) from error


def whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint from which a run goes on: the last one, or the one before where that is damaged.

    Args:
        folder: the run's.

    Returns:
        None if it has none yet.

    Raises:
        TrainingError: both are damaged.
    """
    faults = {}
    for path in (folder / CHECKPOINT, folder / _BEFORE):
        if path.exists():
            if (fault := _fault(path)) is None:
                for damaged, said in faults.items():
                    rank_zero_warn(f"{damaged} is damaged ({said}): the run goes on from {path.name}, saved before it.")
                    if is_first_process():  # or it would take that one's place
                        damaged.rename(damaged.with_suffix(".damaged"))
                return path
            faults[path] = fault
    if faults:
        said = "; ".join(f"{path} is damaged ({fault})" for path, fault in faults.items())
        raise TrainingError(f"{said}. Put back a copy of it, or begin a new run without --resume.")
    return None


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint file, if anything; it is a ZIP archive, with a checksum for each tensor."""
    if path.is_dir():  # of a strategy that shards
        return None
    try:
        broken = damaged_part(path)
    except (BadZipFile, OSError, EOFError, NotImplementedError) as error:
        return first_line(error)
    return None if broken is None else f"wrong checksum of {broken}"


def goes_on_within_epochs(trainer: Trainer) -> bool:
    """Whether the data that a run trains on can go on in the middle of an epoch."""
    data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    return hasattr(trainer.train_dataloader, "state_dict") or is_overridden("state_dict", data)


class RunCheckpoint(ModelCheckpoint):
    """The run's own: its state in a checkpoint has another name than that of a user's ModelCheckpoint."""

    @property
    def state_key(self) -> str:
        """What its state is called."""
        return f"run's {super().state_key}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to keep a state from which the run could not go on."""
        super().on_train_start(trainer, pl_module)
        if self._every_n_train_steps and not goes_on_within_epochs(trainer):
            raise TrainingError(
                "checkpoint_steps needs data that can go on in the middle of an epoch, such as ImageData; leave it out."
            )
