"""Trials on a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ensemblenet.study.trials import Outcome, Trial, run_trial, trial_of
from ensemblenet.training.executor import Cluster, RayTasks

__all__ = ["RayWorkers"]


class RayWorkers(RayTasks[Trial]):
    """Processes that Ray starts on the nodes of a cluster to run trials; a context manager, as they end with it.

    Args:
        cluster: where, and what a trial gets.
        weights: as [`run_trial`][ensemblenet.study.trials.run_trial] takes it; a node that does not see this folder
            trains teachers anew.
    """

    def __init__(self, cluster: Cluster, weights: Path | None = None) -> None:
        super().__init__(cluster, partial(_run_stored, None if weights is None else str(weights.absolute())))

    def warm_up(self, data: Mapping[str, Any]) -> None:
        """Nothing: which nodes will run trials is known when they begin."""


def _run_stored(weights: str | None, stored: Mapping[str, Any]) -> Outcome:
    """On a node: run a trial."""
    return run_trial(trial_of(stored), Path(weights) if weights is not None and Path(weights).is_dir() else None)
