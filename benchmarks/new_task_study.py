"""From a base trained on five classes to the other five: heads that inherit, beside the base with a new classifier.

    python benchmarks/new_task_study.py run --data FOLDER --seconds N   # FOLDER has cifar10/
    python benchmarks/new_task_study.py table

The base is the residual network of plan_study.py. It learns the first five classes of CIFAR-10 from about 5,000 images
at 16 x 16 pixels in 20 epochs, and goes on with about 500 images of the other five for 16 and for 80 epochs. Two heads
have at most 0.95 of the parameters and MACs together. Seed 0 tries three learning rates for every way and length, as
shares of the base's; the best by validation error is taken for the other seeds. Errors are of the test images of the
other five classes. Finished runs are lines of results/new_task_study.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

import plan_study
import torch
from capacity import RESULTS, measure
from finetune_study import CALIBRATION, RATES, SEEDS, WEIGHT, spread
from inherit_start import choosing
from plan_study import BUDGET, in_layout

from ensemblenet import convert
from ensemblenet.conversion.classifier import with_classes
from ensemblenet.data import ParquetImages
from ensemblenet.data.module import Split
from ensemblenet.data.tensors import TensorExamples
from ensemblenet.errors import EnsembleNetError
from ensemblenet.models import CifarResNet
from ensemblenet.study.task import codistilled
from ensemblenet.study.trials import train
from ensemblenet.training.optimization import Optimization

FILE = RESULTS / "new_task_study.jsonl"
FIRST, OTHER = range(5), range(5, 10)
OPTIMIZATION = Optimization("adamw", lr=0.01, weight_decay=0.5)  # the base's best in plan_study.py
EPOCHS = 20  # of the base
LENGTHS = (16, 80)  # epochs on the other classes
BASE = "base, new classifier"

WAYS: dict[str, dict[str, Any]] = {
    BASE: {},
    "base, fresh": {},
    "short, fresh": {"shape": "short"},
    "narrow, dealt": {"shape": "narrow", "init": "inherit"},
    "short, same": {"shape": "short", "init": "inherit"},
    "short, dealt": {"shape": "short", "init": "inherit"},
    "late short, dealt": {"shape": "short", "init": "inherit", "split_at": "stages.1"},
    "late short, dealt, trunk frozen": {
        "shape": "short",
        "init": "inherit",
        "split_at": "stages.1",
        "freeze": "trunk",
    },
}


class SomeClasses(ParquetImages):
    """The images of some neighbouring classes, numbered from 0."""

    def __init__(self, folder: Path, images: int, labels: range) -> None:
        super().__init__(folder, image_size=16, batch_size=100, num_val=5000, limit_train=images)
        self.labels = labels

    def open_split(self, split: Split) -> TensorExamples:
        examples = super().open_split(split)
        kept = (examples.targets >= self.labels.start) & (examples.targets < self.labels.stop)
        return TensorExamples(examples.inputs[kept], examples.targets[kept] - self.labels.start, examples.transform)


@dataclass(frozen=True)
class Run:
    """One training on the other classes."""

    way: str
    epochs: int
    rate: float
    seed: int


class Results(plan_study.Results):
    """The finished runs, and the file that keeps them."""

    def __init__(self) -> None:
        super().__init__(FILE)

    def best_rate(self, way: str, epochs: int) -> float:
        """The share of the learning rate with the lowest validation error, of runs with seed 0."""
        done = [row for row in self.of(seed=0, way=way, epochs=epochs) if "val" in row]
        return min(done, key=lambda row: row["val"]["error"])["run"]["rate"] if done else RATES[0]

    def chosen(self, way: str, epochs: int) -> list[dict[str, Any]]:
        """The runs with that rate, one a seed."""
        return [row for row in self.of(way=way, epochs=epochs, rate=self.best_rate(way, epochs)) if "test" in row]


def runs(results: Results) -> Iterator[Run]:
    for seed in SEEDS:
        for epochs in LENGTHS:
            for way in WAYS:
                rates = RATES if seed == 0 else [results.best_rate(way, epochs)]
                yield from (Run(way, epochs, rate, seed) for rate in rates)


@cache
def prepared(folder: Path, images: int, labels: range) -> SomeClasses:
    """The data, read once."""
    data = SomeClasses(folder / "cifar10", images, labels)
    data.prepare_data()
    data.setup()
    return data


@cache
def trained_base(folder: Path, seed: int) -> CifarResNet:
    """The base that knows the first five classes."""
    data = prepared(folder, 10_000, FIRST)
    torch.manual_seed(seed)
    base = CifarResNet(20, 16, num_classes=len(FIRST))
    data.reseed(seed)
    task = in_layout(codistilled(base, 1.0, "multiclass"), next(iter(data.train_dataloader()))[0])
    train(task, data, OPTIMIZATION, EPOCHS, seed, "bf16")
    print(f"base, seed {seed}: {measure(task, data.test_dataloader(), 'multiclass')['error']:.1f} %", flush=True)
    return base


def finish(run: Run, folder: Path) -> dict[str, Any]:
    """Convert, train on the other classes, and measure."""
    base = trained_base(folder, run.seed)
    data = prepared(folder, 1000, OTHER)
    data.reseed(run.seed + 100)
    batches = list(islice(data.train_dataloader(), CALIBRATION))
    x = batches[0][0]
    torch.manual_seed(run.seed + 100)
    options, found = WAYS[run.way], {}
    if run.way == "base, fresh":
        network = CifarResNet(20, 16, num_classes=len(OTHER))
    elif run.way == BASE:
        # with tensors of its own: it is trained by every run
        network, _ = with_classes(CifarResNet(20, 16, num_classes=len(FIRST)), x[:2], len(OTHER), seed=run.seed)
        kept = {name: value for name, value in base.state_dict().items() if not name.startswith("classifier")}
        network.load_state_dict(kept, strict=False)
    else:
        if "init" in options:
            options = options | {"calibration": batches, "num_classes": len(OTHER)}
        else:
            base = CifarResNet(20, 16, num_classes=len(OTHER))
        with choosing("same" if "same" in run.way else "dealt"):
            network = convert(base, x[:2], 2, BUDGET, **{"split_at": "stem", "seed": run.seed, **options})
        found = plan_study.described(network)
    task = in_layout(codistilled(network, WEIGHT, "multiclass"), x)
    rate = replace(OPTIMIZATION, lr=run.rate * OPTIMIZATION.lr)
    found |= train(task, data, rate, run.epochs, run.seed + 100, "bf16")
    found["val"] = measure(task, data.val_dataloader(), "multiclass")
    found["test"] = measure(task, data.test_dataloader(), "multiclass")
    return found


def run_all(folder: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    results, started = Results(), time.monotonic()
    for run in runs(results):
        if results.of(**vars(run)):
            continue
        if time.monotonic() - started > seconds:
            print("The time is up.")
            return
        try:
            outcome = finish(run, folder)
        except EnsembleNetError as error:  # no such plan: the study goes on
            outcome = {"failed": f"{type(error).__name__}: {error}"}
        results.add(run, outcome)
        said = outcome.get("failed") or f"{outcome['test']['error']:.2f} %, {outcome['cpu_seconds']:.0f} s"
        print(f"{run.way}, {run.epochs} epochs x{run.rate:g} s{run.seed}: {said}", flush=True)


def table(results: Results) -> str:
    """Test error, NLL and time of training of every way after both lengths."""
    heads = ["heads", "parameters, MACs, time", "seeds"]
    heads += [f"{what}, {epochs} epochs" for what in ("error", "NLL", "seconds of training") for epochs in LENGTHS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for way in WAYS:
        done = [results.chosen(way, epochs) for epochs in LENGTHS]
        if not all(done):
            continue
        shares = done[0][0].get("shares", {"parameters": 1, "macs": 1, "time": 1})
        cells = [way, ", ".join(f"{shares[key]:.2f}" for key in ("parameters", "macs", "time")), str(len(done[-1]))]
        cells += [spread([row["test"]["error"] for row in rows], ".1f") for rows in done]
        cells += [spread([row["test"]["nll"] for row in rows], ".2f") for rows in done]
        cells += [f"{fmean(row['cpu_seconds'] for row in rows):.0f}" for rows in done]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Finish what is missing, or print what there is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="a folder with cifar10/", default=Path())
    parser.add_argument("--seconds", type=float, help="begin no run after so many", default=inf)
    args = parser.parse_args()
    if args.action == "run":
        run_all(args.data, args.seconds)
    else:
        print(table(Results()))


if __name__ == "__main__":
    main()
