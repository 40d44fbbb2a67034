"""The command `compare`: every method with the same effort, and one page that says who wins."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from scipy.stats import qmc, ttest_rel
from torch import nn

from ensemblenet.data import load_all
from ensemblenet.errors import TrainingError
from ensemblenet.functional import Task
from ensemblenet.reports.comparison import PAGE, comparison_table, summary, write_comparison
from ensemblenet.storage.runs import (
    CONFIG,
    ENVIRONMENT,
    RESULTS,
    aside,
    create_run_folder,
    environment,
    result_row,
    write_json,
)
from ensemblenet.study.methods import METHODS, Setup
from ensemblenet.study.trials import Cell, Outcome, Precision, Workers, training_memory
from ensemblenet.training.optimization import Optimization

__all__ = ["Ledger", "Study", "Tuning", "Variant", "compare", "paired_test", "read_study", "run_study", "tuning_points"]

_CELLS = "cells.jsonl"
_TABLE = "results.csv"
_TUNING_SEED = 1000  # no test cell has it

_DESCRIPTION = """Train every method on the same data with the same effort, and show who wins and by how much.

It needs a YAML file: `ensemblenet compare --config configs/compare/mnist1d.yaml`. Every setting of the file is also
an option below. `base` and `data` take a class_path with init_args, your own classes too if their folder is on
PYTHONPATH. Learning rate and weight decay are tuned for each method on validation examples, with the same number of
trials; then each is trained with several seeds and tested once, after the last epoch. The run gets a folder of its own
under --runs with every finished cell, results.json, results.csv, figures and a page; a killed study goes on with
--resume FOLDER. docs/compare.md has the details.
"""


@dataclass(frozen=True)
class Tuning:
    """How learning rate and weight decay are found, for every method alike.

    Args:
        trials: how many pairs each method tries.
        lr: the least and the largest learning rate.
        weight_decay: the least and the largest weight decay.
        epochs: of a trial, for trials that are shorter than test runs; None takes the study's.
    """

    trials: int = 8
    lr: tuple[float, float] = (1e-3, 1e-1)
    weight_decay: tuple[float, float] = (1e-2, 1.0)
    epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "epochs"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise TrainingError(f"tuning.{name} must be at least 1, got {number}.")
        for name, (low, high) in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if not 0 < low <= high:
                raise TrainingError(f"tuning.{name} must be two numbers above 0, the smaller first, got {low}, {high}.")


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own, where they differ from the study's.

    Args:
        method: a key of `ensemblenet.study.methods.METHODS`.
        name: what tables call it; None takes the method's title.
        num_heads: K.
        budget: share of the base's parameters and MACs.
        split_at: a split point.
        weight: lambda of co-distillation.
    """

    method: str
    name: str | None = None
    num_heads: int | None = None
    budget: float | None = None
    split_at: str | None = None
    weight: float | None = None

    def setup(self, shared: Setup) -> Setup:
        """The study's setup with this variant's own settings."""
        own = {name: getattr(self, name) for name in ("num_heads", "budget", "split_at", "weight")}
        return replace(shared, **{name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True)
class Study:
    """What is compared on what, as plain data.

    Args:
        base: `class_path` and `init_args` of the network.
        data: `class_path` and `init_args` of the data module.
        methods: which methods, by name or as variants; None takes all. The first must be the base.
        task: what the outputs mean.
        num_heads: K.
        budget: the most that a conversion may cost, as a share of the base's parameters and MACs.
        split_at: where heads part, for methods that share a trunk.
        weight: lambda of co-distillation.
        epochs: passes over the training examples; the last epoch counts.
        optimizer: for all methods.
        seeds: how many test runs of each method.
        tuning: how learning rate and weight decay are found.
        device: where to train, such as "cpu" or "cuda".
        precision: "bf16" trains and measures under bfloat16 autocast, "32" in float32.
    """

    base: dict[str, Any]
    data: dict[str, Any]
    methods: Sequence[str | Variant] | None = None
    task: Literal["multiclass", "multilabel"] = "multiclass"
    num_heads: int = 4
    budget: float = 0.95
    split_at: str = "auto"
    weight: float = 2.0
    epochs: int = 40
    optimizer: Literal["adamw", "sgd"] = "adamw"
    seeds: int = 5
    tuning: Tuning = Tuning()
    device: str = "cpu"
    precision: Precision = "32"

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "num_heads"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def entrants(self) -> dict[str, tuple[str, Setup]]:
        """The method and the setup of each name.

        Raises:
            TrainingError: an unknown method, two of one name, or the first is not the base.
        """
        task: Task = self.task
        shared = Setup(self.num_heads, self.budget, self.split_at, self.weight, task)
        found: dict[str, tuple[str, Setup]] = {}
        for choice in self.methods or [key for key in METHODS if key != "kdcl" or task == "multiclass"]:
            variant = Variant(choice) if isinstance(choice, str) else choice
            if variant.method not in METHODS:
                raise TrainingError(f"methods must be among {', '.join(METHODS)}; got {variant.method!r}.")
            setup = variant.setup(shared)
            name = variant.name or METHODS[variant.method].name(setup)
            if name in found:
                raise TrainingError(f"methods has {name!r} twice; give one of them a name of its own.")
            found[name] = (variant.method, setup)
        if next(iter(found.values()))[0] != "base":
            raise TrainingError("methods must begin with base: all others are compared with it.")
        return found

    def cells(self, phase: Literal["tune", "test"], settings: Mapping[str, Sequence[Optimization]]) -> list[Cell]:
        """The cells of a phase: each method with each of its settings, tuned with one seed, tested with all."""
        tuned = phase == "tune"
        seeds = [_TUNING_SEED] if tuned else range(self.seeds)
        epochs = (tuned and self.tuning.epochs) or self.epochs
        return [
            Cell(
                name,
                method,
                setup,
                self.base,
                self.data,
                phase,
                seed,
                setting,
                epochs,
                self.device,
                self.precision,
            )
            for name, (method, setup) in self.entrants().items()
            for setting in settings.get(name, ())
            for seed in seeds
        ]


class Ledger:
    """The finished cells of a study, one line of JSON each, written as soon as they are finished.

    A cell is found by all that it depends on, so that a study whose settings were changed recomputes what the change
    touches and nothing else.

    Args:
        path: the file; it need not exist.

    Raises:
        TrainingError: a line that is no finished cell; a last line that a kill cut off is none, and dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, Outcome] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        if lines and lines.pop():
            _cut(path, sum(len(line) + 1 for line in lines))
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                self.outcomes[json.dumps(entry["cell"], sort_keys=True)] = entry["outcome"]
            except (ValueError, KeyError, TypeError) as error:
                raise TrainingError(f"{path}, line {number} is no finished cell; remove that line.") from error

    def __getitem__(self, cell: Cell) -> Outcome:
        return self.outcomes[cell.key]

    def __contains__(self, cell: Cell) -> bool:
        return cell.key in self.outcomes

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Keep a finished cell."""
        line = json.dumps({"cell": asdict(cell), "outcome": outcome}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.outcomes[cell.key] = outcome


def run_study(folder: Path, study: Study, workers: int = 2) -> list[dict[str, Any]]:
    """Run what the folder does not hold yet of a study, and write its results, figures and page.

    Args:
        folder: a run folder, new or of a study that was killed.
        study: what to compare.
        workers: processes of one thread each; 0 trains in this one.

    Returns:
        The rows of `results.json`, one for each method that finished a test run.

    Raises:
        TrainingError: the study's settings contradict each other, a worker died, or the base did not finish.
        ConversionError: the base cannot be converted as asked.
    """
    costs = _costs(study)
    ledger = Ledger(folder / _CELLS)
    points = [
        Optimization(study.optimizer, lr=lr, weight_decay=weight_decay)
        for lr, weight_decay in tuning_points(study.tuning)
    ]
    with Workers(workers) as pool:
        trials = study.cells("tune", dict.fromkeys(costs, points))
        _finish(ledger, trials, pool, "Tuning")
        best = {name: _best([trial for trial in trials if trial.name == name], ledger) for name in costs}
        tests = study.cells("test", {name: [cell.optimization] for name, cell in best.items() if cell is not None})
        _finish(ledger, tests, pool, "Testing")

    rows = _rows(study, costs, best, tests, ledger)
    failed = [
        {"method": cell.name, "phase": cell.phase, "seed": cell.seed, "lr": cell.optimization.lr}
        | {"weight_decay": cell.optimization.weight_decay, "reason": ledger[cell]["reason"]}
        for cell in (*trials, *tests)
        if ledger[cell]["status"] == "failed"
    ]
    outcomes = [ledger[cell] for cell in (*trials, *tests)]
    cpu_minutes = sum(outcome.get("cpu_seconds", 0.0) for outcome in outcomes) / 60
    results = {"study": asdict(study), "cpu_minutes": cpu_minutes, "rows": rows, "failed": failed}
    write_json(folder / ENVIRONMENT, environment())
    write_json(folder / RESULTS, results)
    _write_csv(folder / _TABLE, rows)
    if not rows or rows[0]["kind"] != "base":
        raise TrainingError(
            f"The base finished no test run, so there is nothing to compare with: {_reasons(failed)}. "
            f"{folder / RESULTS} has what was finished."
        )
    write_comparison(folder / PAGE, results, environment())
    return rows


def tuning_points(tuning: Tuning) -> list[tuple[float, float]]:
    """Pairs of learning rate and weight decay that cover the ranges evenly, on a logarithmic scale.

    They are the Halton sequence without its corner, so they depend on nothing but the ranges: every method tries the
    same ones, none is luckier, and more trials keep the first ones.

    Example:
        >>> [(round(lr, 4), round(decay, 4)) for lr, decay in tuning_points(Tuning(2, (0.001, 0.1), (0.01, 1.0)))]
        [(0.01, 0.0464), (0.0032, 0.2154)]
    """
    sequence = qmc.Halton(2, scramble=False).fast_forward(1).random(tuning.trials)
    ranges = (tuning.lr, tuning.weight_decay)
    return [
        tuple(low * (high / low) ** share for share, (low, high) in zip(point.tolist(), ranges, strict=True))
        for point in sequence
    ]


def paired_test(values: Mapping[int, float], base: Mapping[int, float]) -> dict[str, Any]:
    """How values differ from the base's over the seeds that both have.

    Args:
        values: of each seed.
        base: of each seed.

    Returns:
        `difference` of the means; `p`, of a two-sided paired t-test, and `interval`, of 95 % for the difference, which
        are None for fewer than two seeds or where every seed differs by the same.

    Example:
        >>> paired_test({0: 1.0, 1: 2.0}, {0: 2.0, 1: 2.5})["difference"]
        -0.75
    """
    seeds = sorted(set(values) & set(base))
    if not seeds:
        return {"difference": None, "p": None, "interval": None}
    ours, theirs = [values[seed] for seed in seeds], [base[seed] for seed in seeds]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    found: dict[str, Any] = {"difference": sum(differences) / len(seeds), "p": None, "interval": None}
    if max(differences) - min(differences) > 1e-12:
        result = ttest_rel(ours, theirs)
        interval = result.confidence_interval(0.95)
        found |= {"p": float(result.pvalue), "interval": [float(interval.low), float(interval.high)]}
    return found


def compare(arguments: Sequence[str]) -> Path:
    """Run a study from a configuration, or go on with one.

    Args:
        arguments: command-line arguments.

    Returns:
        The run's folder.

    Raises:
        TrainingError: bad arguments, nothing to resume, or what [`run_study`][] raises.
    """
    study, plain = read_study(arguments)
    folder = Path(plain["resume"]) if plain["resume"] else create_run_folder(Path(plain["runs"]), plain["name"])
    with aside(folder / CONFIG) as unfinished:
        stored = {key: value for key, value in plain.items() if key not in ("config", "resume", "workers")}
        unfinished.write_text(yaml.safe_dump(stored, sort_keys=False, allow_unicode=True), encoding="utf-8")
    console = Console()
    console.print(f"Finished cells are kept in {folder}; a killed study goes on with --resume {folder}", soft_wrap=True)
    rows = run_study(folder, study, plain["workers"])
    console.print(comparison_table(rows, title=plain["name"]))
    console.print(summary(rows, study.task), highlight=False, soft_wrap=True)
    console.print(f"Page, figures, results.json and results.csv: {folder / PAGE}", highlight=False, soft_wrap=True)
    return folder


def read_study(arguments: Sequence[str]) -> tuple[Study, dict[str, Any]]:
    """The study that arguments and their configuration describe, and all settings as plain data.

    Raises:
        TrainingError: bad arguments, or nothing to resume.
    """
    try:
        options = _parser().parse_args(_with_stored_config(list(arguments)))
    except ArgumentError as error:
        raise TrainingError(str(error)) from error
    plain = yaml.safe_load(_parser().dump(options, skip_unset=False))
    if plain["workers"] < 0:
        raise TrainingError(f"--workers must be at least 0, got {plain['workers']}.")
    study = _study(plain)
    study.entrants()
    return study, plain


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="ensemblenet compare", description=_DESCRIPTION, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with any of these settings")
    parser.add_argument("--name", default="compare", help="begins the name of the run's folder")
    parser.add_argument("--runs", default="runs", help="where run folders are made")
    parser.add_argument("--resume", type=str | None, help="go on with a killed study: its folder")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; 0 trains in this one")
    load_all()
    parser.add_subclass_arguments(nn.Module, "base", required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    parser.add_class_arguments(Study, skip={"base", "data"})
    return parser


def _study(plain: Mapping[str, Any]) -> Study:
    """The study that a parsed configuration describes."""
    skipped = ("config", "name", "runs", "resume", "workers")
    settings = {key: value for key, value in plain.items() if key not in skipped}
    given: dict[str, Any] = settings["tuning"]
    tuning = Tuning(given["trials"], tuple(given["lr"]), tuple(given["weight_decay"]), given["epochs"])
    methods = settings["methods"] and [_variant(item) for item in settings["methods"]]
    return Study(**settings | {"tuning": tuning, "methods": methods})


def _variant(item: Any) -> str | Variant:
    return Variant(**item) if isinstance(item, dict) else item


def _with_stored_config(arguments: list[str]) -> list[str]:
    """The arguments, behind the configuration of the study that they resume."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume")
    resume = finder.parse_known_args(arguments)[0].resume
    if resume is None:
        return arguments
    stored = Path(resume, CONFIG)
    if not stored.is_file():
        raise TrainingError(f"{resume} is no folder of a study: it has no {CONFIG}. Give one under runs/.")
    return ["--config", str(stored), *arguments]


def _costs(study: Study) -> dict[str, dict[str, Any]]:
    """What each method costs; it finds mistakes in the settings before anything is trained."""
    costs = {}
    point = Optimization(study.optimizer)
    for cell in study.cells("tune", {name: [point] for name in study.entrants()}):
        data = cell.data_module()
        x, y = (part.to(study.device) for part in next(iter(data.train_dataloader()))[:2])
        contender = cell.contender(x)
        costs[cell.name] = {
            "cost": contender.cost(x[:1]),
            "training_only_parameters": contender.training_only(),
            "memory_bytes": training_memory(contender, x, y, point),
        }
    return costs


def _finish(ledger: Ledger, cells: Sequence[Cell], pool: Workers, what: str) -> None:
    """Run the cells that the ledger lacks."""
    missing = [cell for cell in cells if cell not in ledger]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(what, total=len(cells), completed=len(cells) - len(missing))
        for cell, outcome in pool.run(missing):
            ledger.add(cell, outcome)
            progress.advance(task)
            if outcome["status"] == "failed":
                progress.console.print(f"failed: {cell.name}, seed {cell.seed}: {outcome['reason']}", soft_wrap=True)


def _best(trials: Sequence[Cell], ledger: Ledger) -> Cell | None:
    """The trial of the lowest validation error, the better likelihood where errors are equal; None if all failed."""
    done = [trial for trial in trials if ledger[trial]["status"] == "done"]
    return min(done, key=lambda trial: (ledger[trial]["error"], ledger[trial]["nll"]), default=None)


def _rows(
    study: Study,
    costs: Mapping[str, Mapping[str, Any]],
    best: Mapping[str, Cell | None],
    tests: Sequence[Cell],
    ledger: Ledger,
) -> list[dict[str, Any]]:
    """One row for each method that has finished a test run."""
    rows: list[dict[str, Any]] = []
    base: dict[int, float] = {}
    for name, (method, setup) in study.entrants().items():
        cells = [cell for cell in tests if cell.name == name]
        done = {cell.seed: ledger[cell] for cell in cells if ledger[cell]["status"] == "done"}
        tuned = best[name]
        if not done or tuned is None:
            continue
        errors = {seed: outcome["error"] for seed, outcome in done.items()}
        if method == "base":
            base = base or errors
        own = costs[name]
        heads = len(next(iter(done.values()))["head_errors"])
        more = {
            "kind": _kind(method, own["cost"], costs),
            "summary": METHODS[method].summary.format(num_heads=setup.num_heads),
            "num_heads": heads,
            "setup": asdict(setup),
            "lr": tuned.optimization.lr,
            "weight_decay": tuned.optimization.weight_decay,
            "trials": study.tuning.trials,
            "validation_error": ledger[tuned]["error"],
            "training_only_parameters": own["training_only_parameters"],
            "memory_bytes": own["memory_bytes"],
            "run_seeds": list(done),
            "failed_seeds": [cell.seed for cell in cells if cell.seed not in done],
            **paired_test(errors, base),
            **_spreads(list(done.values())),
        }
        head_errors = [outcome["head_error"] for outcome in done.values()]
        rows.append(result_row(name, own["cost"], list(errors.values()), head_errors, **more))
    return rows


def _kind(method: str, cost: Any, costs: Mapping[str, Mapping[str, Any]]) -> str:
    """How figures mark it: the base, what costs more than it, this project's method, or another one."""
    base = next(iter(costs.values()))["cost"]
    if method == "base":
        return "base"
    if cost.parameters > base.parameters or cost.macs > base.macs:
        return "larger"
    return "ours" if method == "codistillation" else "other"


def _spreads(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean and standard deviation over seeds of all else that was measured."""
    found = {}
    for key in ("nll", "head_nll", "ece", "disagreement", "agreement", "head_kl", "seconds", "cpu_seconds"):
        values = [outcome[key] for outcome in outcomes if key in outcome]
        if values:
            mean = sum(values) / len(values)
            squares = sum((value - mean) ** 2 for value in values)
            found[f"{key}_mean"] = mean
            found[f"{key}_std"] = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0
    return found


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows' plain values, one line a method."""
    flat = [{key: value for key, value in row.items() if not isinstance(value, (dict, list))} for row in rows]
    with aside(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)


def _reasons(failed: Iterable[Mapping[str, Any]]) -> str:
    return "; ".join(dict.fromkeys(str(cell["reason"]) for cell in failed)) or "no reason is known"


def _cut(path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.truncate(length)
