"""A run of a Slurm job whose time is nearly up: it keeps its state and puts the job back into the queue."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ensemblenet.storage.runs import CHECKPOINT
from ensemblenet.training.checkpoints import goes_on_within_epochs

__all__ = ["Requeue"]


class Requeue(Callback):
    """Ends a run between two batches when Slurm sends SIGUSR1 (`--signal=USR1@120`), and queues its job again.

    In training, the state is kept first where the data can go on from there. Lightning would keep it in the middle of
    a step, in the folder where it was started, where other jobs would find it.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CHECKPOINT
        self.signalled = False
        self._steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen; Lightning, which comes later, leaves a signal to whoever has it."""
        signal.signal(signal.SIGUSR1, self._note)

    def _note(self, *of_signal: Any) -> None:
        self.signalled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run begins."""
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look after each step; gradients that are being accumulated stand in no checkpoint."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        if self._is_time(trainer):
            if goes_on_within_epochs(trainer):
                trainer.save_checkpoint(self.path)
            self._requeue(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Look; the last checkpoint has to do."""
        if self._is_time(trainer):
            self._requeue(trainer)

    def on_test_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Look likewise."""
        self.on_validation_batch_end(trainer)

    def _is_time(self, trainer: Trainer) -> bool:
        """Whether any process of the run got the signal."""
        return trainer.strategy.reduce_boolean_decision(self.signalled, all=False)

    def _requeue(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
            job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
            try:
                subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
                rank_zero_info(f"The time of job {job} is nearly up: it is queued again.")
            except (OSError, subprocess.CalledProcessError) as error:
                said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
                rank_zero_warn(f"`scontrol requeue {job}` failed, so the job ends here: {said}")
        raise SIGTERMException
