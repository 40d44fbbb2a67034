"""The classes of a run: kept when its training begins, and compared when it goes on."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.restore import DESCRIPTION, Describes, compare_classes, stored_classes

__all__ = ["KeepClasses"]


class KeepClasses(Callback):
    """Keeps what the data says of itself when training begins, and refuses to go on with data of other classes.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare, before the network is made for the data."""
        if stage == "fit":
            compare_classes(stored_classes(self.folder), trainer.datamodule)  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep it, once; a run that an earlier version began has kept nothing."""
        data, kept = trainer.datamodule, self.folder / DESCRIPTION  # pyright: ignore[reportAttributeAccessIssue]
        if trainer.is_global_zero and isinstance(data, Describes) and not kept.exists():
            write_json(kept, data.description())
