"""Run a study: tune every method with the same effort, test each with several seeds, and write down who wins."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from scipy.stats import ttest_rel

from ensemblenet._moved import renamed
from ensemblenet.errors import TrainingError
from ensemblenet.functional import Task
from ensemblenet.inputs import call, inputs_and_targets, one_example, to_device
from ensemblenet.metrics.scores import SCORES, in_row
from ensemblenet.reports.comparison import PAGE, summary, write_comparison
from ensemblenet.storage.atomic import atomic_path, write_json
from ensemblenet.storage.cells import as_cell
from ensemblenet.storage.runs import RESULTS, environment, keep_environment, result_row
from ensemblenet.storage.specs import instantiate
from ensemblenet.study.journal import Journal
from ensemblenet.study.methods import METHODS
from ensemblenet.study.on_ray import RayWorkers
from ensemblenet.study.settings import Study, tuning_points
from ensemblenet.study.trials import Outcome, Phase, Trial, Workers, open_data, training_memory
from ensemblenet.timing import measure, step
from ensemblenet.training.executor import Cluster
from ensemblenet.training.module import check_num_classes

__all__ = ["JOURNAL", "Watcher", "paired_test", "run_study"]

__getattr__ = renamed(
    __name__,
    {
        "Ledger": "ensemblenet.study.journal.Journal",
        "compare": "ensemblenet.cli.compare.compare",
        "read_study": "ensemblenet.cli.compare.read_study",
        "Tuning": "ensemblenet.study.settings.Tuning",
        "Variant": "ensemblenet.study.settings.Variant",
    },
)

JOURNAL = "cells.jsonl"
_TABLE = "results.csv"
_TEACHERS = "teachers"  # the weights of trained bases
_TIMINGS = 7

Row = dict[str, Any]
# called with the phase, the number of finished trials, the number of all; and, if any, the trial to which something has
# just happened, and what: its outcome, or a status "running" or "again"
Watcher = Callable[[Phase, int, int, Trial | None, Outcome | None], None]


def run_study(
    folder: Path,
    study: Study,
    workers: int | Cluster = 2,
    *,
    headline: Callable[[Sequence[Mapping[str, Any]], Task], str] = summary,
    watch: Watcher = lambda *_: None,
) -> list[Row]:
    """Run what the folder does not hold yet of a study, and write its results, figures and page.

    Args:
        folder: a run folder, new or of a study that was killed.
        study: the settings.
        workers: processes of one thread each; 0 trains in this one; or the cluster whose nodes train.
        headline: makes the first sentences of the page from the rows and the task.
        watch: called when a phase begins, and when something has happened to a trial.

    Returns:
        The rows of `results.json`, one for each method that finished a test run.

    Raises:
        TrainingError: the study's settings contradict each other, a worker died, or the base did not finish.
        ConversionError: the base cannot be converted as asked.
    """
    candidates = study.candidates()
    here = study.device if isinstance(workers, int) else "cpu"  # a cluster's driver may have no other
    journal = Journal(folder / JOURNAL)
    points = [study.optimization(lr, decay) for lr, decay in tuning_points(study.tuning)]
    weights = folder / _TEACHERS if any(METHODS[one.method].taught for one in candidates.values()) else None
    if weights is not None:
        weights.mkdir(exist_ok=True)  # nodes that see it share this disk
    with Workers(workers, weights) if isinstance(workers, int) else RayWorkers(workers, weights) as pool:
        instantiate(LightningDataModule, study.data).prepare_data()
        pool.warm_up(study.data)
        _, halves = open_data(json.dumps(study.data))
        halved = halves is not None
        costs = _costs(study, here)
        points_of = {name: points for name, one in candidates.items() if one.fixed is None}
        tuning = _run_phase(journal, study, study.trials("tune", points_of, halved), pool, watch)
        best = {name: _best([trial for trial in tuning if trial.name == name], journal) for name in candidates}
        chosen = {name: trial.optimization for name, trial in best.items() if trial is not None}
        chosen |= {name: one.fixed for name, one in candidates.items() if one.fixed is not None}
        best_of = {name: [optimization] for name, optimization in chosen.items()}
        tests = _run_phase(journal, study, study.trials("test", best_of, halved), pool, watch)

    times = _milliseconds(tests, here)  # now that no worker runs
    rows = _rows(study, costs, times, best, tests, journal)
    trials = [*tuning, *tests]
    failed = [
        {
            "method": trial.name,
            "phase": trial.phase,
            "seed": trial.seed,
            "lr": trial.optimization.lr,
            "weight_decay": trial.optimization.weight_decay,
            "reason": journal[trial]["reason"],
        }
        for trial in trials
        if journal[trial]["status"] == "failed"
    ]
    cpu_minutes = sum(journal[trial].get("cpu_seconds", 0.0) for trial in trials) / 60
    settings = asdict(study) | {"init": study.begins}
    results = {"study": settings, "cpu_minutes": cpu_minutes, "rows": rows, "failed": failed, "halves": halves}
    keep_environment(folder, environment())
    write_json(folder / RESULTS, results)
    _write_csv(folder / _TABLE, rows)
    if not rows or rows[0]["kind"] != "base":
        reasons = "; ".join(dict.fromkeys(str(failure["reason"]) for failure in failed)) or "no reason is known"
        raise TrainingError(
            f"The base finished no test run, so there is nothing to compare with: {reasons}. "
            f"{folder / RESULTS} has what was finished."
        )
    write_comparison(folder / PAGE, results, environment(), headline(rows, study.task))
    return rows


def paired_test(values: Mapping[int, float], base: Mapping[int, float]) -> dict[str, Any]:
    """The difference of a method from the base, over the seeds that both have, and a paired t-test.

    Args:
        values: a value of the method for each seed.
        base: the base's values.

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


# -- before, in and behind the trials


def _costs(study: Study, device: str) -> dict[str, dict[str, Any]]:
    """The cost of each method; mistakes in the settings are found here, before anything is trained."""
    costs = {}
    optimization = study.optimization(*tuning_points(study.tuning)[0])
    for trial in study.trials("tune", {name: [optimization] for name in study.candidates()}):
        data = trial.data_module()
        x, y = to_device(inputs_and_targets(next(iter(data.train_dataloader()))), device)
        task = trial.task(x, calibration=[(x, y)])
        with torch.no_grad():
            _, prediction = call(task.eval(), x)
        check_num_classes(prediction.shape[1], data, y, study.task)
        costs[trial.name] = {
            "cost": task.cost(one_example(x)),
            "training_only_parameters": task.training_only(),
            "memory_bytes": training_memory(task, x, y, optimization),
        }
    return costs


def _milliseconds(tests: Sequence[Trial], device: str) -> dict[str, float]:
    """The median time of a training batch's prediction by each method, on a CPU by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = {}
        for name, trial in {trial.name: trial for trial in tests}.items():
            x, y = to_device(inputs_and_targets(next(iter(trial.data_module().train_dataloader()))), device)
            times |= measure({name: step(trial.task(x, calibration=[(x, y)]).eval(), x)}, _TIMINGS)
        return {name: 1000 * seconds for name, seconds in times.items()}
    finally:
        torch.set_num_threads(threads)


def _run_phase(
    journal: Journal, study: Study, trials: Sequence[Trial], pool: Workers | RayWorkers, watch: Watcher
) -> Sequence[Trial]:
    """Run the trials of a phase that the journal lacks, and give all; those that the trained base teaches come last."""
    name, base = next(iter(study.candidates().items()))
    untaught = [trial for trial in trials if not METHODS[trial.method].taught]
    _finish(journal, untaught, pool, watch, 0, len(trials))
    best = _best([trial for trial in untaught if trial.name == name], journal)
    optimization = base.fixed if best is None else best.optimization
    if optimization is None:
        return untaught  # there is no teacher: every base failed
    bases = {"name": name, "method": base.method, "setup": base.setup, "optimization": optimization}
    taught = [replace(trial, teacher=replace(trial, **bases)) for trial in trials if METHODS[trial.method].taught]
    _finish(journal, taught, pool, watch, len(untaught), len(trials))
    return [*untaught, *taught]


def _finish(
    journal: Journal, trials: Sequence[Trial], pool: Workers | RayWorkers, watch: Watcher, before: int, total: int
) -> None:
    """Run the trials that the journal lacks; `before` of the `total` of their phase were run."""
    missing = [trial for trial in trials if trial not in journal]
    finished = before + len(trials) - len(missing)
    if trials:
        watch(trials[0].phase, finished, total, None, None)
    for trial, outcome in pool.run(missing):
        if outcome["status"] in ("done", "failed"):
            journal.add(trial, outcome)
            finished += 1
        watch(trial.phase, finished, total, trial, outcome)


def _best(trials: Sequence[Trial], journal: Journal) -> Trial | None:
    """The trial of the lowest validation error, the better likelihood where errors are equal; None if all failed."""
    done = [trial for trial in trials if journal[trial]["status"] == "done"]
    return min(done, key=lambda trial: (journal[trial]["error"], journal[trial]["nll"]), default=None)


# -- what is written down


def _rows(
    study: Study,
    costs: Mapping[str, Mapping[str, Any]],
    times: Mapping[str, float],
    best: Mapping[str, Trial | None],
    tests: Sequence[Trial],
    journal: Journal,
) -> list[Row]:
    """One row for each method that has finished a test run."""
    rows: list[Row] = []
    base: dict[int, float] = {}
    for name, candidate in study.candidates().items():
        trials = [trial for trial in tests if trial.name == name]
        done = {trial.seed: journal[trial] for trial in trials if journal[trial]["status"] == "done"}
        if not done:
            continue
        errors = {seed: outcome["error"] for seed, outcome in done.items()}
        if candidate.method == "base":
            base = base or errors
        outcomes = list(done.values())
        own = dict(costs[name])
        cost = own.pop("cost")
        tuned = best[name]
        more = {
            "kind": _kind(candidate.method, cost, next(iter(costs.values()))["cost"]),
            "summary": METHODS[candidate.method].summary.format(num_heads=candidate.setup.conversion.num_heads),
            "num_heads": len(outcomes[0]["head_errors"]),
            "setup": asdict(candidate.setup),
            "lr": trials[0].optimization.lr,
            "weight_decay": trials[0].optimization.weight_decay,
            "trials": 0 if tuned is None else study.tuning.trials,
            "validation_error": None if tuned is None else journal[tuned]["error"],
            **own,
            "milliseconds": times[name],
            "run_seeds": list(done),
            "failed_seeds": [trial.seed for trial in trials if trial.seed not in done],
            **paired_test(errors, base),
            **_spreads(outcomes),
        }
        if all("pairs" in outcome for outcome in outcomes):
            more["pairs"] = torch.tensor([outcome["pairs"] for outcome in outcomes]).mean(0).tolist()
        head_errors = [outcome["head_error"] for outcome in outcomes]
        rows.append(result_row(name, cost, list(errors.values()), head_errors, **more))
    return rows


def _kind(method: str, cost: Any, base: Any) -> str:
    """The kind of a method, which figures show by colour: "base", "larger" than the base, "ours", or "other"."""
    if method == "base":
        return "base"
    if cost.parameters > base.parameters or cost.macs > base.macs:
        return "larger"
    return "ours" if method == "codistillation" else "other"


def _spreads(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean and standard deviation over seeds of all else that was measured."""
    found = {}
    for key in (*SCORES, "head_nll", "divergence", "seconds", "cpu_seconds"):
        values = [in_row(key, outcome[key]) for outcome in outcomes if key in outcome]
        if values and key not in ("error", "head_error"):
            mean = sum(values) / len(values)
            squares = sum((value - mean) ** 2 for value in values)
            found |= {f"{key}_mean": mean, f"{key}_std": math.sqrt(squares / max(1, len(values) - 1))}
    return found


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The rows' plain values, one line a method."""
    flat = [
        {
            key: as_cell(value) if isinstance(value, str) else value
            for key, value in row.items()
            if not isinstance(value, (dict, list))
        }
        for row in rows
    ]
    with atomic_path(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)
