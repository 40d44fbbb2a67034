"""Run folders: where a run keeps its configuration, its environment and its results."""

from __future__ import annotations

import logging
import os
import platform
import re
import shlex
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ensemblenet._moved import renamed
from ensemblenet.cost import Cost

__all__ = [
    "create_run_folder",
    "environment",
    "quiet_lightning",
    "result_row",
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
CHECKPOINT = Path("checkpoints", "last.ckpt")


def create_run_folder(runs: Path, name: str) -> Path:
    """Create `runs/<name>-<time>`, with a number behind it where that exists already: never an old folder."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in count(1):
        folder = runs / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def unfinished_runs(runs: Path, name: str) -> list[Path]:
    """The runs of that name, `a/b` in the folder `a`, that have begun and have no results yet, the newest first."""
    stem = runs / name
    names = re.compile(re.escape(stem.name) + r"-(\d{8}-\d{6})(?:-(\d+))?")
    made = {path: match for path in stem.parent.glob("*") if (match := names.fullmatch(path.name))}
    begun = [path for path in made if (path / CONFIG).exists() and not (path / RESULTS).exists()]
    return sorted(begun, key=lambda path: (made[path][1], int(made[path][2] or 1)), reverse=True)


def environment() -> dict[str, Any]:
    """What a result may depend on: versions, machine, command.

    It stands on pages that are shared, so it names no people and no hosts, and of an absolute path the last part alone.
    """
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
    needless = (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*when logging on epoch level in distributed setting.*",  # metrics are of all processes already
        r"Be aware .* add the following callbacks: \[\"ModelCheckpoint\{'monitor': None",  # of an earlier version
        r"\s*Unable to serialize instance",  # of a default: it is left out of config.yaml
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
        >>> row = result_row("base", Cost(10, 20.0), [2.0, 4.0], [2.0, 4.0])
        >>> row["error_mean"], round(row["error_std"], 3), row["seeds"]
        (3.0, 1.414, 2)
    """
    return scores_row(method, cost, {"error": errors, "head_error": head_errors}, **more)


def scores_row(method: str, cost: Cost, scores: Mapping[str, Sequence[float]], **more: Any) -> dict[str, Any]:
    """One row of `results.json` with any scores: for each name the mean, the spread and the value of each seed.

    Example:
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
