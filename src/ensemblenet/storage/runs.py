"""Run folders: where a run keeps its configuration, its environment and its results."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shlex
import shutil
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemblenet._moved import renamed
from ensemblenet.errors import BusyError, LoadError, TrainingError
from ensemblenet.storage import atomic, bucket
from ensemblenet.storage.atomic import atomic_path

if TYPE_CHECKING:
    from ensemblenet.cost import Cost

__all__ = [
    "check_resumable",
    "check_saved",
    "check_trained",
    "create_run_folder",
    "environment",
    "go_on",
    "keep_config",
    "keep_earlier",
    "keep_environment",
    "quiet_lightning",
    "result_row",
    "resumable",
    "scores_row",
    "unfinished_runs",
]

__getattr__ = renamed(
    __name__,
    {
        "AsideCheckpointIO": "ensemblenet.training.checkpoints.AtomicCheckpointIO",
        "aside": "ensemblenet.storage.atomic.atomic_path",
        "write_json": "ensemblenet.storage.atomic.write_json",
    },
)

CONFIG = "config.yaml"
RESULTS = "results.json"
ENVIRONMENT = "environment.json"
MODEL = "model"
RECIPE = "recipe.json"  # of a saved model
CHECKPOINT = Path("checkpoints", "last.ckpt")


def create_run_folder(runs: str | Path, name: str) -> Path:
    """Create `runs/<name>-<time>`, with a number behind it where that exists already: never an old folder.

    Args:
        runs: a folder, or a URL; of that, the folder on this machine that stands for it is made.
        name: of the run.

    Raises:
        TrainingError: a name that leads out of `runs`, or is none.
        FetchError: there is no such bucket, or no right to write in it.

    Example:
        >>> create_run_folder(Path("runs"), "../mine")
        Traceback (most recent call last):
            ...
        ensemblenet.errors.TrainingError: A run's name must be like mine or group/mine, got '../mine'.
    """
    if not name or name.endswith("/") or Path(name).is_absolute() or ".." in Path(name).parts:
        raise TrainingError(f"A run's name must be like mine or group/mine, got {name!r}.")
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    here = bucket.runs_folder(runs)
    (here / name).parent.mkdir(parents=True, exist_ok=True)  # a name may have folders in it
    for attempt in count(1):
        folder = here / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        try:
            is_new = not bucket.is_address(runs) or bucket.claim(folder, here, str(runs))
        except BaseException:
            folder.rmdir()
            raise
        if is_new:
            return folder
        folder.rmdir()
    raise AssertionError("unreachable")


@contextmanager
def resumable(folder: Path, command: str | None, begun: Callable[[], bool], new: bool = True) -> Iterator[None]:
    """What ends a run early says how to go on; where there is nothing to go on from, a new run's folder is removed.

    Args:
        folder: the run's.
        command: that goes on with it, such as "fit"; None where nothing can.
        begun: whether something of the run is worth keeping.
        new: whether this process made the folder.

    Example:
        >>> import tempfile
        >>> folder = create_run_folder(Path(tempfile.mkdtemp()), "fit")
        >>> with resumable(folder, "fit", begun=lambda: False):
        ...     raise ValueError("no such data")
        Traceback (most recent call last):
            ...
        ValueError: no such data
        >>> folder.exists()
        False
    """
    try:
        yield
    except BaseException as error:
        if new and not begun():
            bucket.discard(folder)
        elif command is not None and not isinstance(error, BusyError):
            error.add_note(go_on(command, folder))
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(folder)  # a logger of another library does not say what it could not write
        raise


def go_on(command: str, folder: Path) -> str:
    """The advice to go on with a run.

    Example:
        >>> go_on("fit", Path("runs/tiny"))
        'Go on with `ensemblenet fit --resume runs/tiny`.'
    """
    return f"Go on with `ensemblenet {command} --resume {shlex.quote(bucket.address(folder))}`."


def keep_earlier(path: Path) -> None:
    """Keep what a file of a run says before it is written anew: as `config-1.yaml`, the next time as `config-2.yaml`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "config.yaml")
        >>> for text in ("seed: 1", "seed: 2", "seed: 3"):
        ...     keep_earlier(path)
        ...     _ = path.write_text(text)
        >>> sorted(file.name for file in path.parent.iterdir())
        ['config-1.yaml', 'config-2.yaml', 'config.yaml']
    """
    if not path.exists():
        return
    free = next(
        earlier for number in count(1) if not (earlier := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists()
    )
    with atomic_path(free) as unfinished:
        shutil.copyfile(path, unfinished)


def keep_config(folder: Path, text: str) -> None:
    """Write a run's configuration; an earlier one that says something else is kept."""
    path = folder / CONFIG
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    keep_earlier(path)
    with atomic_path(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def keep_environment(folder: Path, now: Mapping[str, Any]) -> None:
    """Write what [`environment`][ensemblenet.storage.runs.environment] says; of a resumed run behind what it said.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for command in ("fit --config a.yaml", "fit --resume a"):
        ...     keep_environment(folder, {"command": command})
        >>> json.loads((folder / ENVIRONMENT).read_text())
        {'command': 'fit --config a.yaml', 'resumed': [{'command': 'fit --resume a'}]}
    """
    path = folder / ENVIRONMENT
    try:
        first = json.loads(path.read_text(encoding="utf-8"))
        resumed = [*first.pop("resumed", []), now]
    except (FileNotFoundError, ValueError, AttributeError):
        first, resumed = now, []
    atomic.write_json(path, {**first, **({"resumed": resumed} if resumed else {})})


def unfinished_runs(runs: str | Path, name: str) -> list[Path]:
    """The runs of that name, `a/b` in the folder `a`, that have begun and have no results yet, the newest first.

    Of one in a bucket that is not here yet there is then a folder here that holds its configuration.
    """
    bucket.fetch_outlines(runs, name, CONFIG, RESULTS)
    stem = bucket.runs_folder(runs) / name
    names = re.compile(re.escape(stem.name) + r"-(\d{8}-\d{6})(?:-(\d+))?")
    made = {path: match for path in stem.parent.glob("*") if (match := names.fullmatch(path.name))}
    begun = [path for path in made if (path / CONFIG).exists() and not (path / RESULTS).exists()]
    return sorted(begun, key=lambda path: (made[path][1], int(made[path][2] or 1)), reverse=True)


def check_trained(folder: Path) -> None:
    """See that there is a trained model in a folder, of a run or as `save` writes it.

    Raises:
        LoadError: there is none; what is there instead.

    Example:
        >>> check_trained(Path("nowhere"))
        Traceback (most recent call last):
        ...
        ensemblenet.errors.LoadError: nowhere holds no saved model: there is no such folder.
    """
    if (folder / CONFIG).is_file():
        if not (folder / MODEL).is_dir():
            raise LoadError(f"{folder} has no trained model yet; end its run with `ensemblenet fit --resume {folder}`.")
    else:
        check_saved(folder)


def check_saved(folder: Path) -> None:
    """See that there is a saved model in a folder.

    Raises:
        LoadError: there is none; what is there instead.
    """
    if not (folder / RECIPE).is_file():
        why = f"{RECIPE} is missing" if folder.is_dir() else "there is no such folder"
        raise LoadError(f"{folder} holds no saved model: {why}.")


def check_resumable(folder: Path, *other: str) -> None:
    """See that a run or a study was begun in a folder.

    Args:
        folder: that `--resume` names.
        other: what it takes that is no folder.

    Raises:
        TrainingError: none was.
    """
    if not (folder / CONFIG).is_file():
        asked = " or ".join(["a folder under runs/", *other])
        raise TrainingError(f"{folder} has no {CONFIG}, so nothing there can go on: give --resume {asked}.")


def environment() -> dict[str, Any]:
    """What a result may depend on: versions, machine, command.

    It stands on pages that are shared, so it names no people and no hosts, and of an absolute path the last part alone.
    """
    import torch

    packages = ("ensemblenet", "torch", "lightning", "timm", "numpy")
    return {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": shlex.join([Path(sys.argv[0]).name, *map(_without_folders, sys.argv[1:])]),
        "started": f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}",
    }


def _without_folders(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def quiet_lightning() -> None:
    """Keep Lightning from telling what hardware there is and which of its products to install; a warning is a line."""
    warnings.formatwarning = lambda message, *where: f"Warning: {' '.join(str(message).split())}\n"
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.callbacks").setLevel(logging.INFO)  # what a user asked for: a summary
    # that a process of the run was killed, which ends all of them
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    needless = (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*when logging on epoch level in distributed setting.*",  # metrics are of all processes already
        r"Be aware .* add the following callbacks: \[\"ModelCheckpoint\{'monitor': None",  # of an earlier version
        r"\s*Unable to serialize instance",  # of a default: it is left out of config.yaml
        "The dirpath has changed from .*",  # of a run that goes on elsewhere
        "Checkpoint directory .* exists and is not empty.*",  # as that of a resumed run does
    )
    for message in needless:
        warnings.filterwarnings("ignore", message=message)


def result_row(
    method: str, cost: Cost, errors: Sequence[float], head_errors: Sequence[float], **more: Any
) -> dict[str, Any]:
    """One row of `results.json`: what a method costs and how often it errs.

    Args:
        method: "base", "ensemblenet", ...
        cost: of the whole model.
        errors: test error of each seed, in percent.
        head_errors: the mean over its single heads, of each seed, in percent.
        more: further columns.

    Returns:
        Plain data; the spread is the standard deviation of a seed, 0 where there is one seed only.

    Example:
        >>> from ensemblenet.cost import Cost
        >>> row = result_row("base", Cost(10, 20.0), [2.0, 4.0], [2.0, 4.0])
        >>> row["error_mean"], round(row["error_std"], 3), row["seeds"]
        (3.0, 1.414, 2)
    """
    return scores_row(method, cost, {"error": errors, "head_error": head_errors}, **more)


def scores_row(method: str, cost: Cost, scores: Mapping[str, Sequence[float]], **more: Any) -> dict[str, Any]:
    """One row of `results.json` with any scores: for each name the mean, the spread and the value of each seed.

    Example:
        >>> from ensemblenet.cost import Cost
        >>> row = scores_row("base", Cost(10, 20.0), {"gap": [61.0, 63.0]})
        >>> row["gap_mean"], row["gaps"], row["seeds"]
        (62.0, [61.0, 63.0], 2)
    """
    [seeds] = {len(values) for values in scores.values()}
    row: dict[str, Any] = {"method": method, **asdict(cost)}
    for name, values in scores.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        row |= {f"{name}_mean": statistics.fmean(values), f"{name}_std": spread}
    row["seeds"] = seeds
    row |= {f"{name}s": list(values) for name, values in scores.items()}
    return row | more
