"""The command `compare`: every method with the same effort, and one page that says who wins."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from ensemblenet.cli.options import budget_share
from ensemblenet.cli.settings import study_arguments
from ensemblenet.data import load_all
from ensemblenet.errors import TrainingError
from ensemblenet.extras import require
from ensemblenet.reports.comparison import PAGE, begins_with, comparison_table, summary, tested_on
from ensemblenet.storage import TRUST_HELP
from ensemblenet.storage.bucket import address, push, run_folder
from ensemblenet.storage.lock import sole_writer
from ensemblenet.storage.runs import CONFIG, RESULTS, create_run_folder, keep_config, resumable
from ensemblenet.storage.specs import plain, with_data_folder
from ensemblenet.storage.trust import config_option, resumed
from ensemblenet.study.compare import JOURNAL, Watcher, run_study
from ensemblenet.study.from_fit import study_settings
from ensemblenet.study.settings import Study, study_of
from ensemblenet.study.trials import Outcome, Phase, Trial
from ensemblenet.training.executor import Cluster
from ensemblenet.training.resume import changed_setting

__all__ = ["compare", "progress", "read_study"]

_OF_RAY = ("address", "cpus_per_trial", "gpus_per_trial")
_OF_THIS_PROCESS = ("config", "resume", "trust", "workers", "engine", *_OF_RAY)  # they change no figure: not stored

_DESCRIPTION = """Train every method on the same data with the same effort, and show who wins and by how much.

It needs a YAML file: `ensemblenet compare compare/mnist1d`. Every setting of the file is also an option
below. A file of `fit` will do: `ensemblenet compare mnist1d/ensemblenet` compares its base and its
conversion; --methods names others, and --data FOLDER other data. Where --weights FILE names trained weights of the
base, the base is trained on and all others inherit them; --num-classes N is for another task. `base` and `data` take
a class_path with init_args, your own classes too if their folder is on PYTHONPATH. Learning rate and weight decay are
tuned for each method on validation examples, with the same number of trials; then each is trained with several seeds
and tested once, after the last epoch: on the test split or, where there is none, on half of the validation examples,
while the other half tunes.
The run gets a folder of its own under --runs with every finished trial, results.json, results.csv, figures and a page;
a killed study goes on with --resume FOLDER. docs/compare.md has the details.
"""


def compare(arguments: Sequence[str]) -> Path:
    """Run a study from a configuration, or go on with one.

    Args:
        arguments: command-line arguments.

    Returns:
        The run's folder.

    Raises:
        TrainingError: bad arguments, nothing to resume, a study that another process is writing or that has another
            base, data or task, or what [`ensemblenet.study.compare.run_study`][] raises.
    """
    study, plain = read_study(arguments)
    cluster = _cluster(study, plain)
    resume = plain["resume"]
    folder = run_folder(resume) if resume else create_run_folder(plain["runs"], plain["name"])
    console = Console()
    with sole_writer(folder), resumable(folder, "compare", (folder / JOURNAL).exists, new=not resume):
        stored = {key: value for key, value in plain.items() if key not in _OF_THIS_PROCESS}
        keep_config(folder, yaml.safe_dump(stored, sort_keys=False, allow_unicode=True))
        push(folder, always=True)  # early, to see that one may, and to say that the study goes on here
        place = address(folder)
        kept = f"Finished trials are kept in {place}; a killed study goes on with --resume {place}"
        console.print(kept, soft_wrap=True)
        if said := begins_with(asdict(study) | {"init": study.begins}):
            console.print(said, highlight=False, soft_wrap=True)
        with progress(tells=cluster is not None) as watch:
            rows = run_study(folder, study, cluster or plain["workers"], watch=watch)
        push(folder)
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    console.print(comparison_table(rows, f"{plain['name']}, {tested_on(results)}", study.task))
    console.print(summary(rows, study.task), highlight=False, soft_wrap=True)
    console.print(
        f"Page, figures, results.json and results.csv: {address(folder / PAGE)}", highlight=False, soft_wrap=True
    )
    return folder


@contextmanager
def progress(tells: bool = False) -> Iterator[Watcher]:
    """Shows how far a study is; yields what [`ensemblenet.study.compare.run_study`][] takes as `watch`.

    Args:
        tells: whether it is told when trials begin, so that it knows which ones wait.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bars:
        phases = {}
        running: set[str] = set()
        failed: Counter[Phase] = Counter()

        def watch(phase: Phase, done: int, total: int, trial: Trial | None, outcome: Outcome | None) -> None:
            title = {"tune": "Tuning", "test": "Testing"}[phase]
            if phase not in phases:
                phases[phase] = bars.add_task(title)
            if trial and outcome:
                (running.add if outcome["status"] == "running" else running.discard)(trial.key)
                failed[phase] += outcome["status"] == "failed"
                if "reason" in outcome:
                    line = f"{outcome['status']}: {trial.title}: {outcome['reason']}"
                    bars.console.print(line, markup=False, soft_wrap=True)
            counts = {"running": len(running), "waiting": total - done - len(running), "failed": failed[phase]}
            shown = ("running", "waiting", "failed") if tells else ("failed",)
            told = ", ".join(f"{counts[name]} {name}" for name in shown if counts[name])
            bars.update(phases[phase], completed=done, total=total, description=f"{title}: {told}" if told else title)

        yield watch


def read_study(arguments: Sequence[str]) -> tuple[Study, dict[str, Any]]:
    """The study that arguments and their configuration describe, and all settings as plain data.

    Raises:
        TrainingError: bad arguments, nothing to resume, or a study with another base, data or task to resume.
    """
    plain = _parsed(resumed(_written_out(arguments)))
    if plain["resume"]:
        stored = _parsed(config_option(run_folder(plain["resume"]) / CONFIG, trust=True))  # checked with the arguments
        if change := changed_setting(stored, plain, ("base", "data", "task")):
            raise TrainingError(
                f"{plain['resume']} is a study with {change}. Leave that out, or --resume for a new one."
            )
    if plain["workers"] < 0:
        raise TrainingError(f"--workers must be at least 0, got {plain['workers']}.")
    study = study_of(plain)
    study.candidates()
    return study, plain


def _cluster(study: Study, plain: Mapping[str, Any]) -> Cluster | None:
    """The cluster that `--engine ray` names; None for processes of this machine."""
    given = {name: plain[name] for name in _OF_RAY if plain[name] is not None}
    if plain["engine"] != "ray":
        if given:
            raise TrainingError(f"--{next(iter(given))} needs --engine ray.")
        if study.device == "cuda" and torch.cuda.device_count() < study.devices:
            raise TrainingError(
                f"--devices {study.devices} is more than the {torch.cuda.device_count()} GPUs there are."
            )
        return None
    require("ray", "ray")
    cluster = Cluster(**given)
    if study.device != ("cuda" if cluster.gpus_per_trial else "cpu"):
        raise TrainingError(
            "On Ray a trial trains with --device cuda and --gpus_per_trial above 0, or with --device cpu and none; got "
            f"--device {study.device} and --gpus_per_trial {cluster.gpus_per_trial:g}."
        )
    if study.device == "cuda":
        name, share = "gpus", cluster.gpus_per_trial
        fits = share == study.devices or share < study.devices == 1
    else:
        name, share = "cpus", cluster.cpus_per_trial
        fits = share % study.devices == 0
    if not fits:
        raise TrainingError(f"--devices {study.devices} needs --{name}_per_trial {study.devices}; got {share:g}.")
    return cluster


def _written_out(arguments: Sequence[str]) -> list[str]:
    """The arguments as the parser takes them: `fit`'s files as a study's, `a,b` as a list of methods."""
    written: list[str] = []
    for argument in with_data_folder(study_arguments(arguments)):
        inline = argument.startswith("--") and "=" in argument
        option, _, value = argument.partition("=") if inline else (written[-1] if written else "", "", argument)
        if option == "--config":
            value = _study_of_fit(Path(value)) or value
        elif option == "--methods" and re.fullmatch(r"\w+(,\w+)*", value) and value != "null":
            value = f"[{value}]"
        elif option == "--budget":
            try:
                value = json.dumps(budget_share(value))
            except argparse.ArgumentTypeError as error:
                raise TrainingError(f"--budget: {error}") from error
        written.append(f"{option}={value}" if inline else value)
    return written


def _study_of_fit(file: Path) -> str | None:
    """A configuration of `fit` as one of a study; None for any other file, of which the parser says what is wrong."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(config, Mapping) or not isinstance(config.get("model"), Mapping):
        return None
    settings, left_out = study_settings(config)
    without = f" A study has no {', '.join(left_out)}: all methods are trained without." if left_out else ""
    print(f"{file} is of fit: its base and its conversion are compared, tuned around its settings.{without}")
    return yaml.safe_dump(settings, sort_keys=False)


def _parsed(arguments: list[str]) -> dict[str, Any]:
    """Settings as plain data."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except ArgumentError as error:
        raise TrainingError(plain(error, parser)) from error
    return yaml.safe_load(parser.dump(options, skip_unset=False))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="ensemblenet compare", description=_DESCRIPTION, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with any of these settings")
    parser.add_argument("--name", default="compare", help="begins the name of the run's folder")
    parser.add_argument("--runs", default="runs", help="where run folders are made; or s3://BUCKET/PATH")
    parser.add_argument("--resume", type=str | None, help="go on with a killed study: its folder")
    parser.add_argument("--trust", action="store_true", default=argparse.SUPPRESS, help=f"with --resume: {TRUST_HELP}")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; 0 trains in this one")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="what runs trials: docs/scale.md")
    parser.add_argument("--address", type=str | None, help="of Ray: auto (default), HOST:PORT or ray://HOST:PORT")
    parser.add_argument("--cpus_per_trial", type=int | None, help="on Ray: threads of a trial, 1 by default")
    parser.add_argument("--gpus_per_trial", type=float | None, help="on Ray: 0 by default; a fraction shares a GPU")
    load_all()
    parser.add_subclass_arguments(nn.Module, "base", required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    parser.add_class_arguments(Study, skip={"base", "data"})
    return parser
