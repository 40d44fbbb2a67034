"""Base and conversions on YouTube-8M, video level: GAP@20 and mAP of an MLP and a mixture of experts.

    python benchmarks/youtube8m_study.py --data FOLDER     # with validate0000.tfrecord to validate0039.tfrecord

Trains on shards 0000 to 0027 and tests on 0028 to 0039. Every method (base, 2 heads, 4 heads within 0.95 of the base's
parameters and MACs) gets the same number of trials, trained on 0000 to 0023 and compared by GAP@20 on 0024 to 0027; the
best of them is trained anew on all training shards with three other seeds. The test shards are read for these alone.
Finished cells stay in benchmarks/results/youtube8m.jsonl, and a study that was killed goes on after them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from ensemblenet import CoDistillationLoss, EnsembleNet, convert, measure_cost
from ensemblenet.data import YouTube8M
from ensemblenet.metrics.tagging import TaggingMetrics
from ensemblenet.models import MLPTagger, MoETagger
from ensemblenet.training.module import head_outputs
from ensemblenet.training.optimization import Optimization, build_optimizer, build_schedule

RESULTS = Path(__file__).parent / "results" / "youtube8m.jsonl"
BUDGET = 0.95
BATCH = 256
HEADS = (0, 2, 4)  # 0 is the base
SEEDS = (0, 1, 2)
TUNING_SEED = 100

Settings = dict[str, Any]
Split = tuple[Tensor, Tensor]

MODELS: dict[str, Callable[[float], nn.Module]] = {
    "MLP 1152-512-1024-3862": lambda dropout: MLPTagger(hidden=[512, 1024], dropout=dropout),
    "MoE 1152-256-2x3862": lambda dropout: MoETagger(hidden=[256], num_experts=2, dropout=dropout),
}
EPOCHS = {"MLP 1152-512-1024-3862": 18, "MoE 1152-256-2x3862": 8}
# first these, then changes of the best so far
START: Settings = {"weight_decay": 0.05, "weight": 1.0, "split_at": "auto"}
TRIALS: dict[str, dict[bool, tuple[list[Settings], list[Settings]]]] = {
    "MLP 1152-512-1024-3862": {
        False: (
            [{"lr": a, "dropout": b} for a in (0.001, 0.003) for b in (0.0, 0.3)],
            [{"dropout": 0.5}, {"weight_decay": 0.2}],
        ),
        True: (
            [{"lr": a, "dropout": b} for a in (0.001, 0.003) for b in (0.0, 0.3)],
            [{"split_at": "input"}, {"weight": 2.0}],
        ),
    },
    "MoE 1152-256-2x3862": {
        False: ([{"lr": a, "dropout": 0.3} for a in (0.001, 0.003)], [{"dropout": 0.0}, {"lr": 0.01}]),
        True: ([{"lr": a, "dropout": 0.3} for a in (0.001, 0.003)], [{"weight": 2.0}, {"lr": 0.01}]),
    },
}


def load(folder: str, first: int, last: int) -> Split:
    """All videos of a range of shards."""
    names = [f"validate{number:04d}.tfrecord" for number in range(first, last + 1)]
    data = YouTube8M(folder, val=names, train=names, num_workers=0, batch_size=1000)
    data.setup("validate")
    inputs, targets = zip(*data.val_dataloader(), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def run(model: str, heads: int, settings: Settings, seed: int, train: Split, test: Split) -> dict[str, Any]:
    """Train one network and measure it."""
    began = time.process_time()
    torch.manual_seed(seed)
    network = MODELS[model](settings["dropout"])
    if heads:
        network = convert(network, train[0][:2], heads, BUDGET, settings["split_at"], seed, task="multilabel")
    criterion = CoDistillationLoss(settings["weight"], "multilabel")
    optimization = Optimization("adamw", lr=settings["lr"], weight_decay=settings["weight_decay"])
    optimizer = build_optimizer(network, optimization)
    steps = len(train[0]) // BATCH
    schedule = build_schedule(optimizer, EPOCHS[model] * steps, optimization)
    network.train()
    for _ in range(EPOCHS[model]):
        for batch in torch.randperm(len(train[0]))[: steps * BATCH].split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = head_outputs(network, train[0][batch])
            loss = criterion(outputs, train[1][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    metrics = TaggingMetrics(test[1].shape[1], max(1, heads))
    network.eval()
    with torch.no_grad():
        for x, y in zip(test[0].split(1000), test[1].split(1000), strict=True):
            metrics.update(head_outputs(network, x), y)
    cost = measure_cost(network, train[0][:1])
    split = network.recipe.split_at if isinstance(network, EnsembleNet) and network.recipe else None
    width = network.recipe.head.width if isinstance(network, EnsembleNet) and network.recipe else None
    return {
        "metrics": {name: round(value.item(), 6) for name, value in metrics.compute().items()},
        "train_loss": loss.item(),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "split": split,
        "width": width,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


class Cells:
    """Finished cells, by what they were asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The cell of this key, if it is finished."""
        return next((row for row in self.rows if row["key"] == key), None)

    def get(self, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell of this key, computed if it is new."""
        row = self.find(key)
        if row is None:
            row = {"key": key, **compute()}
            self.rows.append(row)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        return row


def tune(cells: Cells, model: str, heads: int, train: Split, test: Split) -> Settings:
    """The settings with the highest GAP@20 on the tuning split."""
    best: tuple[float, Settings] = (-1.0, {})
    first, changes = TRIALS[model][heads > 0]

    def proposals() -> Iterator[Settings]:
        yield from (START | settings for settings in first)
        for change in changes:
            yield best[1] | change

    for settings in proposals():
        key = {"model": model, "heads": heads, "phase": "tune", "seed": TUNING_SEED, "settings": settings}
        row = cells.get(key, lambda s=settings: run(model, heads, s, TUNING_SEED, train, test))
        best = max(best, (row["metrics"]["gap"], settings), key=lambda found: found[0])
    return best[1]


def table(cells: Cells) -> str:
    """The results as Markdown."""
    lines = [
        "| network | method | parameters | MACs | GAP@20, % | mAP, % | one head: GAP@20, % | settings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for heads in HEADS:
            rows = [
                r
                for r in cells.rows
                if (r["key"]["model"], r["key"]["heads"], r["key"]["phase"]) == (model, heads, "test")
            ]
            if not rows:
                continue
            settings = rows[0]["key"]["settings"]
            shown = f"lr {settings['lr']:g}, dropout {settings['dropout']:g}, weight decay {settings['weight_decay']:g}"
            if heads:
                shown += f", λ {settings['weight']:g}, split {rows[0]['split']}, width {rows[0]['width']:g}"
            method = f"{heads} heads" if heads else "base"
            lines.append(
                f"| {model} | {method} | {rows[0]['parameters']:,} | {rows[0]['macs']:,.0f} "
                f"| {spread(rows, 'gap')} | {spread(rows, 'map')} | {spread(rows, 'head_gap')} | {shown} |"
            )
    return "\n".join(lines)


def spread(rows: list[dict[str, Any]], name: str) -> str:
    """Mean and standard deviation over seeds, in percent."""
    values = [100 * row["metrics"][name] for row in rows]
    return f"{fmean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def main() -> None:
    """Run what is not finished, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="the folder of validate0000.tfrecord and so on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells(args.results)
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "threads": 1,
        "batch": BATCH,
        "epochs": EPOCHS,
        "budget": BUDGET,
        "precision": "bfloat16 autocast in training",
    }
    cells.get({"model": None, "heads": None, "phase": "environment"}, lambda: environment)
    tuning, tuned = load(args.data, 0, 23), load(args.data, 24, 27)
    everything = tuple(torch.cat(parts) for parts in zip(tuning, tuned, strict=True))
    test = load(args.data, 28, 39)
    print(f"{len(everything[0]):,} videos to train, {len(test[0]):,} to test", flush=True)
    for model in MODELS:
        for heads in HEADS:
            settings = tune(cells, model, heads, tuning, tuned)
            for seed in SEEDS:
                key = {"model": model, "heads": heads, "phase": "test", "seed": seed, "settings": settings}
                cells.get(key, lambda k=heads, s=settings, n=seed: run(model, k, s, n, everything, test))  # noqa: B023
    print(table(cells))
    spent = sum(row.get("cpu_seconds", 0) for row in cells.rows)
    print(f"{spent / 60:.0f} minutes of processor time")


if __name__ == "__main__":
    main()
