"""Trials on a Ray cluster: its nodes run what the driver sends them as plain data."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ensemblenet.errors import TrainingError, first_line
from ensemblenet.extras import require
from ensemblenet.study.trials import Outcome, Trial, run_trial, trial_of

__all__ = ["REPEATS", "Cluster", "RayWorkers"]

REPEATS = 3  # times that a trial is run again whose node or process died
_LOOK = 0.5  # seconds between two looks at which trials have begun
_ANSWER = 5.0  # seconds within which an address must take a connection
_PATIENCE = 600.0  # seconds to wait for a node in place of the last one that a trial fits
# Of this process alone. Ray would try an address that nobody answers for half an hour.
_OWN = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_gcs_server_port_wait_time_s": "1"}


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what each trial gets of it.

    Args:
        address: "auto" is the cluster that this machine is a node of; HOST:PORT names one that this machine is a node
            of; ray://HOST:PORT is the client's server of any other.
        cpus_per_trial: threads of a trial. Sums depend on their number, so 1 gives the figures of local processes.
        gpus_per_trial: at most 1, as a trial trains on one device; a fraction shares a GPU.

    Raises:
        TrainingError: an address of another form, or a share that a trial cannot use.

    Example:
        >>> Cluster("ray://head:10001", gpus_per_trial=0.5).gpus_per_trial
        0.5
    """

    address: str = "auto"
    cpus_per_trial: int = 1
    gpus_per_trial: float = 0.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|(ray://)?[^/\s]+:\d{1,5}", self.address):
            raise TrainingError(f"--address must be auto, HOST:PORT or ray://HOST:PORT, got {self.address!r}.")
        if self.cpus_per_trial < 1:
            raise TrainingError(f"--cpus_per_trial must be at least 1, got {self.cpus_per_trial}.")
        if not 0 <= self.gpus_per_trial <= 1:
            raise TrainingError(
                f"--gpus_per_trial must be between 0 and 1, as a trial trains on one device; got {self.gpus_per_trial}."
            )


class RayWorkers:
    """Processes that Ray starts on the nodes of a cluster to run trials; a context manager, as they end with it.

    A process that is connected to a cluster already stays so.

    Args:
        cluster: where, and what a trial gets.
        weights: as [`run_trial`][ensemblenet.study.trials.run_trial] takes it; a node that does not see this folder
            trains teachers anew.

    Raises:
        TrainingError: no cluster, one of another version, or none of whose nodes a trial fits.
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, cluster: Cluster, weights: Path | None = None) -> None:
        self.cluster = cluster
        self.weights = weights
        self.tasks: dict[Any, tuple[Trial, int, int]] = {}  # of each: the trial, its number there, how often it died

    def __enter__(self) -> RayWorkers:
        require("ray", "ray")
        for name, value in _OWN.items():
            os.environ.setdefault(name, value)
        import ray

        self.joined = not ray.is_initialized()
        if self.joined:
            _join(self.cluster.address)
        try:
            if not self._is_possible():
                raise TrainingError(self._impossible())
            self.board = _board()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        # Ray's own repeats are silent, and without end where memory runs out.
        options = {"num_cpus": self.cluster.cpus_per_trial, "num_gpus": self.cluster.gpus_per_trial}
        self.runner: Any = ray.remote(**options, max_retries=0, max_calls=0)(_run_stored)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        import ray

        for task in self.tasks:  # nobody waits for what they do
            with suppress(Exception):  # a cluster that is gone has ended them
                ray.cancel(task, force=True)
        if self.joined:
            ray.shutdown()

    def warm_up(self, data: Mapping[str, Any]) -> None:
        """Nothing: which nodes will run trials is known when they begin."""

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        """Give what happens to each trial as soon as it does.

        Yields:
            The trial, and its outcome, or a `status` "running", or "again" with the `reason`: its node or process has
            died, and it waits for another. That is done at most `REPEATS` times.

        Raises:
            TrainingError: a node cannot run trials, the last one that they fit is gone, or nodes died under one trial
                until its repeats were used up; the other trials are finished before.
        """
        import ray
        from ray import exceptions

        died = {
            exceptions.NodeDiedError: "its node died",
            exceptions.LocalRayletDiedError: "its node died",
            exceptions.WorkerCrashedError: "its process died",
            exceptions.OutOfMemoryError: "its node ran out of memory",
            exceptions.ObjectLostError: "its outcome was lost with a node",
        }
        weights = None if self.weights is None else str(self.weights.absolute())
        common = (weights, self.cluster.cpus_per_trial, _versions(), os.getcwd(), self.board)
        numbers = count()

        def submit(trial: Trial, deaths: int) -> None:
            number = next(numbers)
            self.tasks[self.runner.remote(json.dumps(asdict(trial)), *common, number)] = trial, number, deaths

        for trial in trials:
            submit(trial, 0)
        running: set[int] = set()
        lost: list[str] = []
        last = time.monotonic()
        while self.tasks:
            ready, _ = ray.wait(list(self.tasks), timeout=_LOOK)
            begun: set[int] = set()
            with suppress(exceptions.RayActorError):  # it restarts
                begun.update(ray.get(self.board.read.remote()))
            for task, (trial, number, _) in self.tasks.items():
                if number in begun and task not in ready:
                    running.add(number)
                    yield trial, {"status": "running"}
            for task in ready:
                trial, number, deaths = self.tasks.pop(task)
                running.discard(number)
                try:
                    outcome = json.loads(ray.get(task))
                except tuple(died) as error:
                    why = next(text for kind, text in died.items() if isinstance(error, kind))
                    if deaths == REPEATS:
                        lost.append(f"{trial.name}, seed {trial.seed} ({why})")
                        continue
                    submit(trial, deaths + 1)
                    outcome = {"status": "again", "reason": f"{why}; repeat {deaths + 1} of at most {REPEATS}"}
                except exceptions.RayError as error:
                    said = first_line(getattr(error, "cause", None) or error)
                    raise TrainingError(f"A node of the cluster cannot run trials: {said}") from error
                yield trial, outcome
            last = time.monotonic() if begun or ready else last
            if not running and time.monotonic() - last > _PATIENCE and not self._is_possible():
                raise TrainingError(self._impossible())
        if lost:
            raise TrainingError(
                f"{'; '.join(lost)}: died {REPEATS + 1} times. What is finished is kept: go on with --resume when the "
                "nodes are well, with more of the node for a trial (--cpus_per_trial) if memory ran out."
            )

    def _nodes(self) -> list[Mapping[str, float]]:
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def _is_possible(self) -> bool:
        wanted = {"CPU": self.cluster.cpus_per_trial, "GPU": self.cluster.gpus_per_trial}
        return any(all(node.get(name, 0) >= share for name, share in wanted.items()) for node in self._nodes())

    def _impossible(self) -> str:
        nodes = [f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in self._nodes()]
        return (
            f"No node of the cluster has {self.cluster.cpus_per_trial} CPUs and {self.cluster.gpus_per_trial:g} GPUs "
            f"for a trial; there are nodes of {'; '.join(sorted(set(nodes))) or 'nothing'}. Lower --cpus_per_trial or "
            "--gpus_per_trial, or add a node."
        )


def _board() -> Any:
    """An actor to which trials say that they have begun."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Board:  # in here it is sent as it stands: its process need not import PyTorch
        def __init__(self) -> None:
            self.begun: list[int] = []

        def begin(self, number: int) -> None:
            self.begun.append(number)

        def read(self) -> list[int]:
            """The numbers since the last call."""
            begun, self.begun = self.begun, []
            return begun

    # beside the driver: on another node it could die with that
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1)(Board).remote()


def _run_stored(
    stored: str, weights: str | None, threads: int, versions: Mapping[str, str], folder: str, board: Any, number: int
) -> str:
    """On a node: run a trial that is described as JSON, and give its outcome so."""
    board.begin.remote(number)  # not waited for: a task that waits gives its CPU to the next
    if (here := _versions()) != versions:
        raise TrainingError(f"it has {_named(here)}, the driver {_named(versions)}. Install the same on all nodes.")
    torch.set_num_threads(threads)
    with suppress(OSError):  # relative paths are the driver's, where its folder is shared
        os.chdir(folder)
    kept = Path(weights) if weights is not None and Path(weights).is_dir() else None
    return json.dumps(run_trial(trial_of(json.loads(stored)), kept))


def _versions() -> dict[str, str]:
    """Of what decides a figure; builds for other devices (`2.11.0+cpu`) count as one."""
    return {name: version(name).partition("+")[0] for name in ("ensemblenet", "torch")}


def _named(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {number}" for name, number in versions.items())


def _join(address: str) -> None:
    """Connect this process to a cluster, as its driver."""
    import ray
    from ray.exceptions import RayError

    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
        except (OSError, OverflowError) as error:
            raise TrainingError(
                f"Nothing answers at --address {address}: {getattr(error, 'strerror', None) or error}. "
                "`ray start --head` begins a cluster and prints its address; `ray status` asks one."
            ) from error
    is_main = threading.current_thread() is threading.main_thread()
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, AssertionError, RayError) as error:
        said = " ".join(str(error).split())
        raise TrainingError(
            f"No Ray cluster can be used at --address {address}: {said} "
            "From a machine that is no node of it, --address is ray://HOST:10001."
        ) from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, on_terminate)  # Ray's would end with its number as the exit code
