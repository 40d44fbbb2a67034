"""A run on a Ray cluster, whose folder the driver keeps: one in several processes by Ray Train, or a plan search."""

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

import torch
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
    check_versions,
    go_to,
    joined,
    nodes,
    versions,
)
from ensemblenet.training.executor import Cluster, Outcome, RayTasks
from ensemblenet.training.fit import finished, opened, searched, tried
from ensemblenet.training.options import listed
from ensemblenet.training.search import Candidate
from ensemblenet.training.settings import FitCLI
from ensemblenet.training.sharding import FSDP2, FullyShardedStrategy

__all__ = ["fit_on_ray"]

_LOOK = 0.5  # seconds between two looks at what the nodes print
_DDP = "DDPStrategy"
_TIMEOUT = 1800.0  # of DDP, in seconds


def fit_on_ray(arguments: Sequence[str], **given: Any) -> Path:
    """As [`ensemblenet.training.fit.fit`][], in `trainer.num_nodes` times `trainer.devices` processes of a cluster.

    The candidates of a plan search, which are trained in one process each, are spread over the nodes.

    Args:
        arguments: command-line arguments.
        given: of [`Cluster`][ensemblenet.training.executor.Cluster]; all but the address are for plan searches.

    Returns:
        The run's folder.

    Raises:
        TrainingError: what `fit` raises; no cluster, or one without room; nodes that do not see the run's folder; or
            processes that died until the repeats were used up.
        MissingExtraError: Ray is not installed.
    """
    cluster = Cluster(**given)
    with ExitStack() as held:
        held.enter_context(joined(cluster.address))
        run = opened(arguments, held, partial(_OnDriver, given=given))
        if run.config["plan"] == "search":
            return _searched(run, cluster)
        trainer = run.config["trainer"]
        processes, on_gpus = _processes(trainer), _on_gpus(trainer["accelerator"])
        _check_room(processes, on_gpus)
        more = {"changed": run.changed, "versions": versions(), "board": held.enter_context(_printed())}
        settings = _settings(run) | more
        _train(settings, processes, on_gpus, _arguments_of_ddp(trainer["strategy"]).get("timeout"))
        return run.folder


class _OnDriver(FitCLI):
    """Reads the configuration, and makes nothing of it but the run's folder; of a search, what finds its candidates."""

    def __init__(self, *args: Any, given: Mapping[str, Any], **options: Any) -> None:
        self.given = given
        self.command = " ".join(["fit --engine ray", *(f"--{name} {value}" for name, value in given.items())])
        super().__init__(*args, **options)

    def instantiate_classes(self) -> None:
        """Refuse what Ray cannot do, and make the folder."""
        for place in map(str, (self.config["runs"], self.config["resume"])):
            if is_address(place):
                raise TrainingError(
                    f"On Ray a run is kept in a folder that all nodes see, not in a bucket; got {place}."
                )
        if self.config["plan"] == "search":
            _device(self.config["trainer"]["accelerator"], self.given)
            super().instantiate_classes()
            return
        if others := [name for name in self.given if name != "address"]:
            raise TrainingError(f"--{others[0]} is for --plan search and compare; a run takes --trainer.devices.")
        _processes(self.config["trainer"])
        _arguments_of_ddp(self.config["trainer"]["strategy"])
        self.folder = self.choose_folder()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Of a search: it trains nothing, and its machine may have no other device than nodes."""
        self.config_init["trainer"]["accelerator"] = "cpu"
        return super().instantiate_trainer(**kwargs)


class _OfDriver(FitCLI):
    """A run whose folder the driver keeps."""

    def __init__(self, *args: Any, folder: Path, **options: Any) -> None:
        self.given = folder
        super().__init__(*args, **options)

    def find_folder(self) -> Path:
        """The one that the driver names."""
        return self.given


class _OnNode(_OfDriver):
    """A process of the run."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Let Ray say which process this is, and which device it has."""
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
        from ray.train.torch import get_device

        chosen, strategy = self.config_init["trainer"], self.config["trainer"]["strategy"]
        shards = strategy == FSDP2
        chosen["strategy"] = _ShardedOnRay() if shards else RayDDPStrategy(**_arguments_of_ddp(strategy))
        chosen["plugins"] = [*listed(chosen["plugins"]), RayLightningEnvironment()]
        chosen["accelerator"], chosen["devices"], chosen["num_nodes"] = get_device().type, "auto", 1
        trainer = super().instantiate_trainer(**kwargs)
        return trainer if shards else prepare_trainer(trainer)  # which knows Ray's own strategies alone


class _ShardedOnRay(FullyShardedStrategy):
    @property
    def root_device(self) -> torch.device:
        """Which Ray gave to this process."""
        from ray.train.torch import get_device

        return get_device()


def _searched(run: _OnDriver, cluster: Cluster) -> Path:
    """A plan search, whose candidates are trained and validated on nodes."""
    settings = _settings(run) | {"device": _device(run.config["trainer"]["accelerator"], run.given)}

    def on_nodes(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Outcome]]:
        running: set[str] = set()
        failed: list[str] = []
        waiting = {candidate.title for candidate in candidates}
        for candidate, outcome in workers.run(candidates):
            title, status = candidate.title, outcome.pop("status")
            (running.add if status == "running" else running.discard)(title)
            (waiting.add if status == "again" else waiting.discard)(title)
            said = f"{title}: {status}" + (f": {outcome['reason']}" if "reason" in outcome else "")
            failed += [said] if status == "failed" else []
            print(f"{said} ({len(running)} running, {len(waiting)} waiting, {len(failed)} failed)", flush=True)
            if status == "done":
                yield candidate, outcome
        if failed:
            raise TrainingError("; ".join(failed))

    with RayTasks[Candidate](cluster, partial(_try_on_node, settings)) as workers:
        return searched(run, on_nodes)


def _device(accelerator: str, given: Mapping[str, Any]) -> str:
    """What a candidate trains on."""
    on_gpu = given.get("gpus_per_trial", 0) > 0
    if accelerator not in ("auto", *(("gpu", "cuda") if on_gpu else ("cpu",))):
        raise TrainingError(
            "On Ray a candidate trains with --trainer.accelerator gpu and --gpus_per_trial above 0, or with cpu and "
            f"none; got {accelerator} and {given.get('gpus_per_trial', 0):g}."
        )
    return "gpu" if on_gpu else "cpu"


def _settings(run: FitCLI) -> dict[str, Any]:
    """What processes on nodes know of a run, as plain data."""
    return {
        "arguments": ["--config", run.stored_settings(), *(["--trust"] if run.trust else [])],
        "folder": str(run.folder.absolute()),
        "here": os.getcwd(),
        "command": sys.argv,
    }


def _processes(trainer: Mapping[str, Any]) -> int:
    devices = str(trainer["devices"])
    if not devices.isdigit() or int(devices) < 1:
        raise TrainingError(
            f"--engine ray needs a number as --trainer.devices: that of processes on a node; got {devices}."
        )
    return int(devices) * trainer["num_nodes"]


def _arguments_of_ddp(strategy: Any) -> dict[str, Any]:
    """What a configuration gives for DDP; nothing for FSDP2.

    Raises:
        TrainingError: it names another strategy.
    """
    if strategy in ("auto", "ddp", FSDP2):
        return {}
    if isinstance(strategy, Namespace) and strategy["class_path"].rpartition(".")[2] in (_DDP, f"Ray{_DDP}"):
        return {name: value for name, value in strategy.get("init_args", {}).items() if value is not None}
    name = strategy["class_path"] if isinstance(strategy, Namespace) else strategy
    raise TrainingError(
        f"On Ray fit trains with --trainer.strategy ddp or {FSDP2}, or {_DDP} with its arguments; got {name}."
    )


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


def _try_on_node(settings: Mapping[str, Any], stored: Mapping[str, Any]) -> Outcome:
    """On a node: train and validate a candidate of a search; what a user must mend is an outcome, too."""
    try:
        folder = _entered(settings)
        device = ["--trainer.accelerator", settings["device"]]
        with ExitStack() as held:
            run = opened([*settings["arguments"], *device], held, partial(_OfDriver, folder=folder))
            run.datamodule.prepare_data()
            run.datamodule.setup("fit")
            return {"status": "done", **tried(run, Candidate(**stored))}
    except EnsembleNetError as error:
        return {"status": "failed", "reason": first_line(error)}


def _entered(settings: Mapping[str, Any]) -> Path:
    """The run's folder, which this process of a node sees from now on as the driver does."""
    go_to(settings["here"])
    folder = Path(settings["folder"])
    if not (folder / NOTE).exists():  # which the driver keeps there
        raise TrainingError(
            f"The node {socket.gethostname()} does not see {folder}, the run's folder: --runs must be a folder "
            "that all nodes and the driver share."
        )
    sys.argv[:] = settings["command"]  # which the run keeps
    os.environ.pop("SLURM_NTASKS", None)  # of a job that started the cluster, and not this process
    return folder


def _train_on_node(settings: Mapping[str, Any]) -> None:
    """On a node, in each process: train and test as `fit` does."""
    import ray.train

    check_versions(settings["versions"])
    folder = _entered(settings)
    rank_zero_only.rank = ray.train.get_context().get_world_rank()  # pyright: ignore[reportFunctionMemberAccess]
    with ExitStack() as held:
        if rank_zero_only.rank == 0:  # pyright: ignore[reportFunctionMemberAccess]
            held.enter_context(redirect_stdout(_Told(settings["board"], "stdout")))
            held.enter_context(redirect_stderr(_Told(settings["board"], "stderr")))
        run = opened(settings["arguments"], held, partial(_OnNode, folder=folder))
        run.changed[:] = settings["changed"]
        finished(run)
