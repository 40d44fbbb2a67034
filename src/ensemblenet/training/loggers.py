"""Loggers of other services, in the folder of the run."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from ensemblenet.errors import TrainingError
from ensemblenet.training.processes import is_first_process

__all__ = ["more_loggers"]

_MLFLOW_RUN = "mlflow_run.txt"


def more_loggers(name: str | None, folder: Path) -> list[Logger]:
    """W&B or MLflow, in the run's folder, under the run's name."""
    if name is None:
        return []
    try:
        if name == "wandb":
            return [WandbLogger(folder.name, save_dir=folder, id=folder.name, resume="allow")]
        return [_mlflow(folder)]
    except ModuleNotFoundError as error:
        raise TrainingError(f"--log_to {name} needs its library: pip install {name}.") from error


def _mlflow(folder: Path) -> MLFlowLogger:
    """A logger to MLFLOW_TRACKING_URI, or to a database in the run's folder; a resumed run goes on in its own run."""
    known = folder / _MLFLOW_RUN
    logger = MLFlowLogger(
        "ensemblenet",
        run_name=folder.name,
        tracking_uri=os.getenv("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}",
        run_id=known.read_text() if known.is_file() else None,
    )
    if is_first_process():
        known.write_text(str(logger.run_id))
    return logger
