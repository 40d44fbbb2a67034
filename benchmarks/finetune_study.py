"""From a trained base: how fast heads that inherit become as good as it, and what they should inherit.

    python benchmarks/finetune_study.py run --data FOLDER --seconds N   # after plan_study.py, whose bases it takes
    python benchmarks/finetune_study.py table

The bases are those of plan_study.py whose training overfits: a ResNet of three blocks a stage, a deeper perceptron, a
small ViT. Conversions cost at most 0.95 of the parameters and MACs and 1.05 of the predicted time. They and the base
are trained on for 5, 10, 30 and 100 % of the base's epochs, each with a schedule of its own; some of them also with
the base as teacher. Seed 0 tries three learning rates at each length, as shares of the base's; the best by validation
error is taken for the other seeds, and that of 30 % for 100 %. All else is measured on test examples. Finished runs are
lines of results/finetune_study.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import plan_study
import torch
from capacity import RESULTS, measure
from inherit_start import choosing
from plan_study import BASE, BUDGET, SETTINGS, in_layout, prepared, trained_base
from torch import nn

from ensemblenet import Budget, EnsembleNet, convert
from ensemblenet.errors import BudgetError, EnsembleNetError
from ensemblenet.recipe import Importance, Shape
from ensemblenet.study.methods.teacher import Taught
from ensemblenet.study.task import Setup, codistilled
from ensemblenet.study.trials import train
from ensemblenet.training.optimization import Optimization

FILE = RESULTS / "finetune_study.jsonl"
BASES = ("ResNet, overfits", "YouTube-8M, overfits", "ViT, overfits")
SEEDS = (0, 1, 2)
LENGTHS = (0.05, 0.1, 0.3, 1.0)  # of the base's epochs
RATES = (1.0, 0.3, 0.1)  # of the base's learning rate
CALIBRATION = 8  # batches
WEIGHT = 2.0  # the lambda


@dataclass(frozen=True)
class Start:
    """How heads begin.

    Args:
        shape: narrow or short heads; none is the base itself.
        choice: what they inherit: "same" in all heads, "dealt" out or by "chance"; nothing is fresh weights.
        importance: as for `convert`.
        split: "early" or "late", as plan_study.py has it.
    """

    shape: Shape | None = None
    choice: str | None = None
    importance: Importance | None = None
    split: str = "early"


STARTS = {
    "base": Start(),
    "fresh short": Start("short"),
    "narrow, by chance": Start("narrow", "chance", "random"),
    "narrow, same": Start("narrow", "same"),
    "narrow, dealt": Start("narrow", "dealt"),
    "short, same": Start("short", "same"),
    "short, dealt": Start("short", "dealt"),
    "late narrow, dealt": Start("narrow", "dealt", split="late"),
    "late short, dealt": Start("short", "dealt", split="late"),
}
LONG = ("base", "fresh short", "narrow, dealt", "short, dealt")
TAUGHT = ("narrow, dealt", "short, dealt")
PARTS = ((STARTS, LENGTHS[:-1], 0.0), (LONG, LENGTHS[-1:], 0.0), (TAUGHT, LENGTHS[:-1], 1.0))


@dataclass(frozen=True)
class Run:
    """One training that goes on from a trained base."""

    setting: str
    start: str
    length: float
    rate: float
    seed: int
    teacher: float = 0.0  # the weight of the base as teacher


class Results(plan_study.Results):
    """The finished runs, and the file that keeps them."""

    def __init__(self) -> None:
        super().__init__(FILE)

    def best_rate(self, **wanted: Any) -> float:
        """The share of the learning rate with the lowest validation error, of runs with seed 0."""
        done = [row for row in self.of(seed=0, **wanted) if "val" in row]
        return min(done, key=lambda row: row["val"]["error"])["run"]["rate"] if done else RATES[0]


def runs(names: list[str], results: Results) -> Iterator[Run]:
    """All runs in order: the longest, and those with the base as teacher, come last."""
    for starts, lengths, teacher in PARTS:
        for seed, setting, start, length in product(SEEDS, names, starts, lengths):
            run = Run(setting, start, length, 1.0, seed, teacher)
            tuned = {"setting": setting, "start": start, "length": min(length, 0.3), "teacher": teacher}
            tried = RATES if seed == 0 and length < 1 else [results.best_rate(**tuned)]
            yield from (replace(run, rate=rate) for rate in tried)


def finish(run: Run, results: Results, folder: Path, kept: Path) -> dict[str, Any]:
    """Convert, measure, train on and measure again."""
    setting, data = SETTINGS[run.setting], prepared(run.setting, folder)
    [(lr, decay)] = plan_study.Results().best(1, setting=run.setting, plan=BASE)
    of_base = plan_study.Run(run.setting, BASE, 1.0, lr, decay, run.seed)
    base = trained_base(of_base, data, kept).network
    data.reseed(run.seed + 100)
    batches = list(islice(data.train_dataloader(), CALIBRATION))
    network = base
    found: dict[str, Any] = {}
    if run.start != BASE:
        network = converted(base, batches, run)
        found = plan_study.described(network)
    task = codistilled(network, WEIGHT, setting.task)
    if run.teacher:
        setup = Setup(weight=WEIGHT, task=setting.task, teacher_weight=run.teacher)
        task = Taught(network, trained_base(of_base, data, kept).network, setup)
    task = in_layout(task, batches[0][0])
    found["before"] = measure(task, data.test_dataloader(), setting.task)
    epochs = max(1, round(run.length * setting.epochs))
    optimization = Optimization("adamw", lr=run.rate * lr, weight_decay=decay)
    found |= train(task, data, optimization, epochs, run.seed + 100, setting.precision)
    found["val"] = measure(task, data.val_dataloader(), setting.task)
    found["test"] = measure(task, data.test_dataloader(), setting.task)
    return found


def converted(base: nn.Module, batches: list[Any], run: Run) -> EnsembleNet:
    setting, start = SETTINGS[run.setting], STARTS[run.start]
    options: dict[str, Any] = {
        "num_heads": 2,
        "budget": Budget(BUDGET, BUDGET, time=1.05),
        "split_at": setting.early if start.split == "early" else setting.late,
        "seed": run.seed,
        "task": setting.task,
    }
    x = batches[0][0][:2]
    if start.choice is not None:
        options |= {"init": "inherit", "importance": start.importance, "calibration": batches}
    with choosing(start.choice or "dealt"):
        if start.shape == "narrow":  # whose time no budget holds
            return convert(base, x, shape="narrow", **options | {"budget": BUDGET})
        try:
            return convert(base, x, shape="short", **options)
        except BudgetError:  # not at full width: the shortest heads, with the width that fits
            return convert(base, x, depth=0.0, **options)


def run_all(names: list[str], folder: Path, kept: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    results, started = Results(), time.monotonic()
    for run in runs(names, results):
        if results.of(**asdict(run)):
            continue
        if time.monotonic() - started > seconds:
            print("The time is up.")
            return
        try:
            outcome = finish(run, results, folder, kept)
        except EnsembleNetError as error:  # no such plan, or a loss that became infinite: the study goes on
            outcome = {"failed": f"{type(error).__name__}: {error}"}
        results.add(run, outcome)
        print(summary(results.rows[-1]), flush=True)


def summary(row: dict[str, Any]) -> str:
    """A finished run in a line."""
    run = Run(**row["run"])
    name = f"{run.setting} | {run.start} {run.length:g} x{run.rate:g} t{run.teacher:g} s{run.seed} |"
    if "failed" in row:
        return f"{name} {row['failed']}"
    costs = " ".join(f"{share:.2f}" for share in row.get("shares", {}).values())
    return (
        f"{name} {costs} | {row['before']['error']:.2f} -> {row['test']['error']:.2f} "
        f"nll {row['test']['nll']:.3f}, {row['seconds']:.0f} s"
    )


def table(name: str, results: Results) -> str:
    """One base: test error before training and after each length, and the NLL after each."""
    shares = [f"{length:.0%}" for length in LENGTHS]
    heads = ["heads", "teacher", "parameters, MACs, time", "before", *shares, *(f"NLL {share}" for share in shares)]
    lines = [f"### {name}\n", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for teacher in (0.0, 1.0):
        for start in STARTS:
            own = results.of(setting=name, start=start, teacher=teacher)
            done = {length: chosen(results, name, start, length, teacher) for length in LENGTHS}
            if not any(done.values()):
                lines += [f"| {start} | {teacher:g} | {row['failed']} |" for row in own[:1] if "failed" in row]
                continue
            rows = next(rows for rows in done.values() if rows)
            shares_of = [row["shares"] for row in rows if "shares" in row]
            costs = [fmean(share[key] for share in shares_of) for key in ("parameters", "macs", "time") if shares_of]
            cells = [start, f"{teacher:g}", ", ".join(f"{cost:.2f}" for cost in costs)]
            cells.append(spread([row["before"]["error"] for row in rows], ".1f"))
            cells += [spread([row["test"]["error"] for row in done[length]], ".2f") for length in LENGTHS]
            cells += [spread([row["test"]["nll"] for row in done[length]], ".3f") for length in LENGTHS]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def chosen(results: Results, setting: str, start: str, length: float, teacher: float) -> list[dict[str, Any]]:
    """The runs with the learning rate that seed 0 found best, one a seed."""
    wanted = {"setting": setting, "start": start, "teacher": teacher}
    rate = results.best_rate(**wanted, length=min(length, 0.3))
    return [row for row in results.of(**wanted, length=length, rate=rate) if "test" in row]


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation, and of how many where that is not all."""
    if not values:
        return ""
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{deviation}" + (f" ({len(values)})" if len(values) < len(SEEDS) else "")


def main() -> None:
    """Finish what is missing, or print what there is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="a folder with cifar10/ and youtube8m/video_level/", default=Path())
    parser.add_argument("--seconds", type=float, help="begin no run after so many", default=inf)
    parser.add_argument("--setting", choices=BASES, help="this one alone")
    parser.add_argument("--kept", type=Path, help="has the trained bases", default=Path("runs/plan_study"))
    args = parser.parse_args()
    names = [args.setting] if args.setting else list(BASES)
    if args.action == "run":
        run_all(names, args.data, args.kept, args.seconds)
    else:
        print("\n\n".join(table(name, Results()) for name in names))


if __name__ == "__main__":
    main()
