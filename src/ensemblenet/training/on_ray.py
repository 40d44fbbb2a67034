"""One run in processes of a Ray cluster, by Ray Train: the driver keeps the run's folder, and nodes train into it."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ensemblenet.errors import LOST_PROCESS, EnsembleNetError, TrainingError, first_line
from ensemblenet.storage.bucket import is_address
from ensemblenet.storage.lock import NOTE
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
from ensemblenet.training.fit import finished, opened
from ensemblenet.training.options import listed
from ensemblenet.training.settings import FitCLI

__all__ = ["fit_on_ray"]

_LOOK = 0.5  # seconds between two looks at what the nodes print
_DDP = "DDPStrategy"
_TIMEOUT = 1800.0  # of DDP, in seconds


def fit_on_ray(arguments: Sequence[str], address: str = "auto") -> Path:
    """As [`ensemblenet.training.fit.fit`][], in `trainer.num_nodes` times `trainer.devices` processes of a cluster.

    Args:
        arguments: command-line arguments.
        address: of the cluster, as [`check_address`][ensemblenet.training.cluster.check_address] takes it.

    Returns:
        The run's folder.

    Raises:
        TrainingError: what `fit` raises; no cluster, or one without room; nodes that do not see the run's folder; or
            processes that died until the repeats were used up.
        MissingExtraError: Ray is not installed.
    """
    check_address(address)
    with ExitStack() as held:
        held.enter_context(joined(address))
        run = opened(arguments, held, partial(_OnDriver, address=address))
        trainer = run.config["trainer"]
        processes, on_gpus = _processes(trainer), _on_gpus(trainer["accelerator"])
        _check_room(processes, on_gpus)
        settings = {
            "arguments": ["--config", run.stored_settings(), *(["--trust"] if run.trust else [])],
            "folder": str(run.folder.absolute()),
            "changed": run.changed,
            "here": os.getcwd(),
            "command": sys.argv,
            "versions": versions(),
            "board": held.enter_context(_printed()),
        }
        _train(settings, processes, on_gpus, _arguments_of_ddp(trainer["strategy"]).get("timeout"))
        return run.folder


class _OnDriver(FitCLI):
    """Reads the configuration, and makes nothing of it but the run's folder."""

    def __init__(self, *args: Any, address: str, **options: Any) -> None:
        self.command = f"fit --engine ray --address {address}"
        super().__init__(*args, **options)

    def instantiate_classes(self) -> None:
        """Refuse what Ray Train cannot do, and make the folder."""
        if self.config["plan"] == "search":
            raise TrainingError("--plan search trains one run after another by itself: leave out --engine ray.")
        for place in map(str, (self.config["runs"], self.config["resume"])):
            if is_address(place):
                raise TrainingError(
                    f"On Ray a run is kept in a folder that all nodes see, not in a bucket; got {place}."
                )
        _processes(self.config["trainer"])
        _arguments_of_ddp(self.config["trainer"]["strategy"])
        self.folder = self.choose_folder()


class _OnNode(FitCLI):
    """A process of the run, whose folder the driver keeps."""

    def __init__(self, *args: Any, folder: Path, **options: Any) -> None:
        self.given = folder
        super().__init__(*args, **options)

    def find_folder(self) -> Path:
        """The one that the driver names."""
        return self.given

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Let Ray say which process this is, and which device it has."""
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
        from ray.train.torch import get_device

        chosen = self.config_init["trainer"]
        chosen["strategy"] = RayDDPStrategy(**_arguments_of_ddp(self.config["trainer"]["strategy"]))
        chosen["plugins"] = [*listed(chosen["plugins"]), RayLightningEnvironment()]
        chosen["accelerator"], chosen["devices"], chosen["num_nodes"] = get_device().type, "auto", 1
        return prepare_trainer(super().instantiate_trainer(**kwargs))


def _processes(trainer: Mapping[str, Any]) -> int:
    devices = str(trainer["devices"])
    if not devices.isdigit() or int(devices) < 1:
        raise TrainingError(
            f"--engine ray needs a number as --trainer.devices: that of processes on a node; got {devices}."
        )
    return int(devices) * trainer["num_nodes"]


def _arguments_of_ddp(strategy: Any) -> dict[str, Any]:
    """What a configuration gives for DDP.

    Raises:
        TrainingError: it names another strategy.
    """
    if strategy in ("auto", "ddp"):
        return {}
    if isinstance(strategy, Namespace) and strategy["class_path"].rpartition(".")[2] in (_DDP, f"Ray{_DDP}"):
        return {name: value for name, value in strategy.get("init_args", {}).items() if value is not None}
    name = strategy["class_path"] if isinstance(strategy, Namespace) else strategy
    raise TrainingError(f"On Ray fit trains with --trainer.strategy ddp, or {_DDP} with its arguments; got {name}.")


def _on_gpus(accelerator: str) -> bool:
    if accelerator == "auto":
        return any(node.get("GPU", 0) >= 1 for node in nodes())
    if accelerator not in ("cpu", "gpu", "cuda"):
        raise TrainingError(f"On Ray fit trains with --trainer.accelerator cpu or gpu, got {accelerator}.")
    return accelerator != "cpu"


def _check_room(processes: int, on_gpus: bool) -> None:
    """Refuse what Ray would wait for without end."""
    shares = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes()]
    if sum(min(share) if on_gpus else share[0] for share in shares) < processes:
        each = "a CPU and a GPU" if on_gpus else "a CPU"
        found = "; ".join(sorted({f"{cpus} CPUs and {gpus} GPUs" for cpus, gpus in shares}))
        raise TrainingError(
            f"The cluster has no room for {processes} processes with {each} each; there are nodes of "
            f"{found or 'nothing'}. Give less as --trainer.devices or --trainer.num_nodes, or add a node."
        )


def _train(settings: Mapping[str, Any], processes: int, on_gpus: bool, timeout: Any) -> None:
    """Train until it is done; where processes die, again from the last checkpoint.

    Ray Train's own `max_failures` would also repeat what a user must mend, and says nothing.
    """
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    seconds = _TIMEOUT if timeout is None else timeout.total_seconds()
    said = ""
    for repeat in range(1, REPEATS + 2):
        with tempfile.TemporaryDirectory() as own, _signals() as terminated:
            trainer = TorchTrainer(
                _train_on_node,
                train_loop_config=dict(settings),
                scaling_config=ScalingConfig(num_workers=processes, use_gpu=on_gpus),
                torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo", timeout_s=max(1, int(seconds))),
                run_config=RunConfig(
                    name="run",
                    storage_path=own,  # it writes nothing there that a run needs
                    failure_config=FailureConfig(max_failures=0),
                    logging_config=LoggingConfig(log_level="CRITICAL"),
                ),
            )
            try:
                trainer.fit()
                return
            except SystemExit as error:  # of Ray's handler of Ctrl-C
                raise KeyboardInterrupt from error
            except RayActorError as error:
                raise TrainingError(f"Ray Train's controller died: {first_line(error)}") from error
            except TrainingFailedError as error:
                said = _why(error)
                if repeat > REPEATS:
                    raise TrainingError(f"{said} That happened {repeat} times.") from error
        if terminated:
            raise SIGTERMException  # out here: no KeyboardInterrupt of Ray's is behind it
        print(f"{said} The run goes on from its last checkpoint; repeat {repeat} of at most {REPEATS}.", flush=True)


def _why(error: Any) -> str:
    """Which processes died; what ended the run otherwise is raised."""
    failures = getattr(error, "worker_failures", {})
    died = []
    for rank, failure in sorted(failures.items()):
        if type(failure).__module__.startswith("ray."):
            died.append(str(rank))
        elif isinstance(failure, EnsembleNetError) or not (
            isinstance(failure, RuntimeError) and re.search(LOST_PROCESS, str(failure))
        ):
            raise failure
    if died:
        return f"Of the run's processes, number {' and '.join(died)} died."
    if failures:
        return f"A process of the run does not answer: {first_line(next(iter(failures.values())))}"
    return f"Ray Train ended: {first_line(getattr(error, 'controller_failure', error))}"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Within it SIGTERM is noted in the list that is given, and ends what is done there; nothing is raised then.

    Ray makes a KeyboardInterrupt of whatever a handler raises. Its own handler of Ctrl-C does not outlive this.
    """
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, note)
    try:
        yield noted
    except BaseException:
        if not noted:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _printed() -> Iterator[Any]:
    """Within it this process prints what is told to the board that it yields."""
    import ray

    told = board()
    ended = Event()

    def look() -> None:
        while True:
            last = ended.wait(_LOOK)
            for stream, text in ray.get(told.read.remote()):
                print(text, end="", file=getattr(sys, stream), flush=True)
            if last:
                return

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        ended.set()
        thread.join()


class _Told(io.TextIOBase):
    """A stream whose text the driver prints."""

    def __init__(self, told: Any, stream: str) -> None:
        self.told, self.stream = told, stream

    def write(self, text: str) -> int:
        """Tell it."""
        self.told.tell.remote((self.stream, text))
        return len(text)


def _train_on_node(settings: Mapping[str, Any]) -> None:
    """On a node, in each process: train and test as `fit` does."""
    import ray.train

    check_versions(settings["versions"])
    go_to(settings["here"])
    folder = Path(settings["folder"])
    if not (folder / NOTE).exists():  # which the driver keeps there
        raise TrainingError(
            f"The node {socket.gethostname()} does not see {folder}, the run's folder: --runs must be a folder "
            "that all nodes and the driver share."
        )
    sys.argv[:] = settings["command"]  # which the run keeps
    os.environ.pop("SLURM_NTASKS", None)  # of a job that started the cluster, and not this process
    rank_zero_only.rank = ray.train.get_context().get_world_rank()  # pyright: ignore[reportFunctionMemberAccess]
    with ExitStack() as held:
        if rank_zero_only.rank == 0:  # pyright: ignore[reportFunctionMemberAccess]
            held.enter_context(redirect_stdout(_Told(settings["board"], "stdout")))
            held.enter_context(redirect_stderr(_Told(settings["board"], "stderr")))
        run = opened(settings["arguments"], held, partial(_OnNode, folder=folder))
        run.changed[:] = settings["changed"]
        finished(run)
