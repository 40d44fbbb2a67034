"""One run in several processes: all must know the folder that the first one makes, and end when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from threading import Event, Thread
from threading import enumerate as threads
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch.distributed import DistStoreError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ensemblenet.errors import EnsembleNetError, TrainingError

__all__ = ["agreed_folder", "ending_together", "goes_on_unasked", "is_first_process", "is_slurm_job"]

_FOLDER = "ENSEMBLENET_RUN_FOLDER"
_PATIENCE = timedelta(minutes=5)
_GLANCES, _LOOKS, _LAST_WORDS = 0.05, 1.0, 5.0  # seconds
_LIGHTNINGS_WATCH = "child-process-observer"
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


@contextmanager
def ending_together(launcher: Any, advice: Callable[[], str | None]) -> Iterator[None]:
    """End the processes of a run when one of them fails or dies, each in one line that says how to go on.

    A process that waits for a dead one learns it from their connection. One that does not, or whose connection says
    nothing, as NCCL's, is ended by a watch: of the first process over those that Lightning started, and of these over
    the first one. Processes that torchrun or Slurm started are watched by them.

    Args:
        launcher: of the trainer's strategy.
        advice: how to go on; None where nothing can.
    """
    run = _Processes(launcher)
    ended = Event()
    Thread(target=run.watch, args=(advice, ended), daemon=True).start()
    try:
        yield
    except Exception as error:
        ended.set()
        is_own = isinstance(error, EnsembleNetError) or not isinstance(error, RuntimeError)
        said = None if is_own else run.found_killed()  # why it could not go on
        run.end()
        raised = error if said is None else TrainingError(said)
        if not is_first_process() and (more := advice()):
            raised.add_note(more)
        if raised is error:
            raise
        raise raised from error
    finally:
        ended.set()


class _Processes:
    """The other processes of a run that Lightning started: none where there is one, or where something else did."""

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher
        self.parent = None if is_first_process() or _cluster() is not None else os.getppid()

    def started(self) -> list[Popen[Any]]:
        """Those that this process started."""
        return [process for process in getattr(self.launcher, "procs", []) if isinstance(process, Popen)]

    def lost(self, killed: bool = False) -> str | None:
        """What to say of the first process found dead, or found killed; None where all live or are done."""
        if self.parent is not None and os.getppid() != self.parent:
            return "Another process of the run has ended: the first one."
        for number, process in enumerate(self.started(), 1):
            code = process.poll() or 0
            if code < 0:
                return (
                    f"Another process of the run has ended: number {number} was killed by {signal.Signals(-code).name}."
                )
            if code and not killed:
                return f"Another process of the run has ended: number {number}, with exit code {code}."
        return None

    def found_killed(self) -> str | None:
        """As `lost` says it, after a little time: a killed process closes its connections before it counts as ended."""
        end = time.monotonic() + _LAST_WORDS
        while self.parent is not None or self.started():
            if (said := self.lost(killed=True)) is not None or time.monotonic() > end:
                return said
            time.sleep(_GLANCES)
        return None

    def watch(self, advice: Callable[[], str | None], ended: Event) -> None:
        """End this process, in one line, if another one died and it has not noticed."""
        said = None
        while said is None:
            if ended.wait(_LOOKS):
                return
            self._take_over()
            said = self.lost()
        if ended.wait(_LAST_WORDS):  # what noticed it says more
            return
        print(f"ensemblenet fit: {said} {advice() or ''}".rstrip(), file=sys.stderr, flush=True)
        for process in self.started():
            process.kill()
        os._exit(2)  # the other threads may wait for ever

    def end(self) -> None:
        """End the processes that this one started; one that stands still would never end by itself."""
        for process in self.started():
            try:
                process.wait(_LAST_WORDS)  # it may have an error of its own to tell
            except TimeoutExpired:
                process.kill()

    def _take_over(self) -> None:
        """Leave nothing to Lightning's own watch, which kills this process before it can say anything."""
        watched = getattr(self.launcher, "procs", [])
        if watched and any(thread.name == _LIGHTNINGS_WATCH for thread in threads()):
            self.launcher.procs = list(watched)
            watched.clear()


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
