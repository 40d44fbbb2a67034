"""Tasks on a Ray cluster: its nodes work on what the driver sends them as plain data."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch

from ensemblenet.errors import TrainingError, first_line
from ensemblenet.training.cluster import (
    REPEATS,
    board,
    check_address,
    check_versions,
    go_to,
    joined,
    nodes,
    versions,
)

__all__ = ["Cluster", "Outcome", "RayTasks", "Task"]

_LOOK = 0.5  # seconds between two looks at which tasks have begun
_PATIENCE = 600.0  # seconds to wait for a node in place of the last one that a task fits

Outcome = dict[str, Any]


class Task(Protocol):
    """Something to be done, a dataclass of plain data."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def title(self) -> str:
        """What messages call it."""
        ...


T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what each trial gets of it.

    Args:
        address: as [`check_address`][ensemblenet.training.cluster.check_address] takes it.
        cpus_per_trial: threads of a trial. Sums depend on their number, so 1 gives the figures of local processes.
        gpus_per_trial: a fraction below 1 shares a GPU.

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
        check_address(self.address)
        if self.cpus_per_trial < 1:
            raise TrainingError(f"--cpus_per_trial must be at least 1, got {self.cpus_per_trial}.")
        if self.gpus_per_trial < 0 or (self.gpus_per_trial > 1 and self.gpus_per_trial % 1):
            raise TrainingError(
                f"--gpus_per_trial must be a fraction, or a whole number of at least 0; got {self.gpus_per_trial:g}."
            )


class RayTasks(Generic[T]):
    """Processes that Ray starts on the nodes of a cluster to work on tasks; a context manager, as they end with it.

    A process that is connected to a cluster already stays so.

    Args:
        cluster: where, and what a task gets.
        work: makes of a task, as a dictionary, its outcome, which has a `status` "done" or "failed"; a function of a
            module that nodes have, whose arguments that are bound are plain data.

    Raises:
        TrainingError: no cluster, one of another version, or none of whose nodes a task fits.
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, cluster: Cluster, work: Callable[[Mapping[str, Any]], Outcome]) -> None:
        self.cluster = cluster
        self.work = work
        self.tasks: dict[Any, tuple[T, int, int]] = {}  # of each: the task, its number there, how often it died

    def __enter__(self) -> Self:
        with ExitStack() as held:
            held.enter_context(joined(self.cluster.address))
            import ray

            if not self._is_possible():
                raise TrainingError(self._impossible())
            self.board = board()
            self.held = held.pop_all()
        # Ray's own repeats are silent, and without end where memory runs out.
        options = {"num_cpus": self.cluster.cpus_per_trial, "num_gpus": self.cluster.gpus_per_trial}
        self.runner: Any = ray.remote(**options, max_retries=0, max_calls=0)(_work)
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for task in self.tasks:  # nobody waits for what they do
            with suppress(Exception):  # a cluster that is gone has ended them
                ray.cancel(task, force=True)
        self.held.close()

    def run(self, tasks: Sequence[T]) -> Iterator[tuple[T, Outcome]]:
        """Give what happens to each task as soon as it does.

        Yields:
            The task, and its outcome, or a `status` "running", or "again" with the `reason`: its node or process has
            died, and it waits for another. That is done at most `REPEATS` times.

        Raises:
            TrainingError: a node cannot run tasks, the last one that they fit is gone, or nodes died under one task
                until its repeats were used up; the other tasks are finished before.
        """
        import ray
        from ray import exceptions

        died = {
            exceptions.NodeDiedError: "its node died",
            exceptions.LocalRayletDiedError: "its node died",
            exceptions.WorkerCrashedError: "its process died",
            exceptions.OutOfMemoryError: "its node ran out of memory",
            exceptions.ObjectLostError: "its outcome was lost with a node",
            ChildProcessError: "one of its processes died",
        }
        common = (self.work, self.cluster.cpus_per_trial, versions(), os.getcwd(), self.board)
        numbers = count()

        def submit(task: T, deaths: int) -> None:
            number = next(numbers)
            self.tasks[self.runner.remote(json.dumps(asdict(task)), *common, number)] = task, number, deaths

        for task in tasks:
            submit(task, 0)
        running: set[int] = set()
        lost: list[str] = []
        last = time.monotonic()
        while self.tasks:
            ready, _ = ray.wait(list(self.tasks), timeout=_LOOK)
            begun: set[int] = set()
            with suppress(exceptions.RayActorError):  # it restarts
                begun.update(ray.get(self.board.read.remote()))
            for reference, (task, number, _) in self.tasks.items():
                if number in begun and reference not in ready:
                    running.add(number)
                    yield task, {"status": "running"}
            for reference in ready:
                task, number, deaths = self.tasks.pop(reference)
                running.discard(number)
                try:
                    outcome = json.loads(ray.get(reference))
                except tuple(died) as error:
                    why = next(text for kind, text in died.items() if isinstance(error, kind))
                    if deaths == REPEATS:
                        lost.append(f"{task.title} ({why})")
                        continue
                    submit(task, deaths + 1)
                    outcome = {"status": "again", "reason": f"{why}; repeat {deaths + 1} of at most {REPEATS}"}
                except exceptions.RayError as error:
                    said = first_line(getattr(error, "cause", None) or error)
                    raise TrainingError(f"A node of the cluster cannot run trials: {said}") from error
                yield task, outcome
            last = time.monotonic() if begun or ready else last
            if not running and time.monotonic() - last > _PATIENCE and not self._is_possible():
                raise TrainingError(self._impossible())
        if lost:
            raise TrainingError(
                f"{'; '.join(lost)}: died {REPEATS + 1} times. What is finished is kept: go on with --resume when the "
                "nodes are well, with more of the node for a trial (--cpus_per_trial) if memory ran out."
            )

    def _is_possible(self) -> bool:
        wanted = {"CPU": self.cluster.cpus_per_trial, "GPU": self.cluster.gpus_per_trial}
        return any(all(node.get(name, 0) >= share for name, share in wanted.items()) for node in nodes())

    def _impossible(self) -> str:
        found = [f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes()]
        return (
            f"No node of the cluster has {self.cluster.cpus_per_trial} CPUs and {self.cluster.gpus_per_trial:g} GPUs "
            f"for a trial; there are nodes of {'; '.join(sorted(set(found))) or 'nothing'}. Lower --cpus_per_trial or "
            "--gpus_per_trial, or add a node."
        )


def _work(
    stored: str,
    work: Callable[[Mapping[str, Any]], Outcome],
    threads: int,
    of_driver: Mapping[str, str],
    folder: str,
    board: Any,
    number: int,
) -> str:
    """On a node: work on a task that is described as JSON, and give its outcome so."""
    board.tell.remote(number)  # not waited for: a task that waits gives its CPU to the next
    check_versions(of_driver)
    torch.set_num_threads(threads)
    go_to(folder)
    return json.dumps(work(json.loads(stored)))
