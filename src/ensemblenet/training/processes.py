"""One run in several processes: all of them must know the folder that the first one makes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch.distributed import DistStoreError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ensemblenet.errors import EnsembleNetError, TrainingError

__all__ = ["agreed_folder", "end_processes", "goes_on_unasked", "is_first_process", "is_slurm_job"]

_FOLDER = "ENSEMBLENET_RUN_FOLDER"
_PATIENCE = timedelta(minutes=5)
_LAST_WORDS = 5.0  # seconds
_stores: list[TCPStore] = []  # one must stay open until the last process has read it


def is_first_process() -> bool:
    """Whether this process writes what a run has once: true for a run in one process."""
    return rank_zero_only.rank == 0  # pyright: ignore[reportFunctionMemberAccess]  Lightning sets it


def is_slurm_job() -> bool:
    """Whether `srun` started this process."""
    return SLURMEnvironment.detect()


def goes_on_unasked() -> bool:
    """Whether a run without `--resume` goes on with an unfinished one of its settings: it may be started several times.

    So it is in a job that Slurm queued again, and under torchrun with `--max-restarts`. There no process can tell
    whether it is the first: the agent of a node that was lost counts from 0 again.
    """
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0:
        return True
    if not TorchElasticEnvironment.detect() or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return False
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1 and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == str(True):
        rank_zero_warn(
            "An agent of torchrun that is lost and started again cannot join the others (PyTorch issue 135712): start "
            "all agents with --rdzv-backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in their environment."
        )
    return True


def agreed_folder(choose: Callable[[], Path]) -> Path:
    """The folder that the first process of a run chooses, in all of its processes.

    Processes that Lightning starts inherit it in their environment. Those that torchrun or Slurm started ask the first
    one, at the port above the one that they meet at.

    Args:
        choose: makes or finds the folder; only the first process calls it.

    Raises:
        TrainingError: the first process did not answer, or found no folder, for the reason that it gives.
    """
    cluster = _cluster()
    if is_first_process():
        try:
            folder = choose()
        except EnsembleNetError as error:
            if cluster is not None:
                _tell(cluster, {"error": str(error)})
            raise
        os.environ[_FOLDER] = str(folder)
        if cluster is not None:
            _tell(cluster, {"folder": str(folder)})
        return folder
    if cluster is None:
        return Path(os.environ[_FOLDER])
    store = _meet(cluster)
    try:
        answer = json.loads(store.get(_FOLDER))
    except RuntimeError as error:  # also where the first process has ended
        raise TrainingError(f"The first process of the run named no folder within {_PATIENCE}: {error}") from error
    if "error" in answer:
        store.set(f"{_FOLDER}/{cluster.global_rank()}", "heard")
        raise TrainingError(answer["error"])
    return Path(answer["folder"])


def end_processes(launcher: Any) -> None:
    """End the processes that Lightning started for a run that failed; one that stands still would never end by itself.

    Args:
        launcher: of the trainer's strategy.
    """
    started = [process for process in getattr(launcher, "procs", []) if isinstance(process, Popen)]
    for process in started:
        try:
            process.wait(_LAST_WORDS)  # it may have an error of its own to tell
        except TimeoutExpired:
            process.kill()


def _tell(cluster: ClusterEnvironment, answer: dict[str, str]) -> None:
    """Answer the other processes; one that ends then must not take the answer with it."""
    store = _meet(cluster)
    store.set(_FOLDER, json.dumps(answer))
    if "error" in answer:
        with suppress(DistStoreError):
            store.wait([f"{_FOLDER}/{rank}" for rank in range(1, cluster.world_size())])


def _cluster() -> ClusterEnvironment | None:
    """What started the processes, if not Lightning."""
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            made = kind()
            return made if made.world_size() > 1 else None
    return None


def _meet(cluster: ClusterEnvironment) -> TCPStore:
    try:
        store = TCPStore(
            cluster.main_address,
            cluster.main_port + 1,
            is_master=is_first_process(),
            timeout=_PATIENCE,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        where = f"port {cluster.main_port + 1} of {cluster.main_address}"
        raise TrainingError(f"The processes of the run could not meet at {where}: {error}") from error
    _stores.append(store)
    return store
