"""How must the co-distillation loss be scaled over heads, so that a head learns as fast as the base did?

The loss is a mean over K heads, which sends each head 1/K of the gradient. On MNIST-1D, this trains a base
and its 4-headed version of the same size (weight 2) in three ways, under SGD with momentum and under AdamW:

    mean      the loss as it is: 1/K of the gradient to a head, the heads' mean to the trunk
    sum       the loss times K: all of the gradient to a head, the heads' sum to the trunk
    balanced  EnsembleNet(balance_gradients=True): all of the gradient to a head, the heads' mean to the trunk

Each has the same learning rates to choose from by validation error, and is also tested at the base's choice:
that is what a user gets who converts a network and keeps the settings. `alone` is a single narrow head on its
own trunk: how fast a head learns when no other head is there.

    OMP_NUM_THREADS=1 python benchmarks/gradient_scale.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from mnist1d.data import get_dataset_args, make_dataset
from mnist1d.utils import ObjectView
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from ensemblenet.cost import count_parameters
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.functional import codistillation

NUM_HEADS = 4
WEIGHT = 2.0
BATCH = 100
EARLY = 3  # epochs after which learning speed is read off
VARIANTS = ["base", "mean", "sum", "balanced"]
SETTINGS = {
    "SGD, batch norm": [0.1, 0.3, 1.0, 3.0],
    "AdamW, batch norm": [0.003, 0.01, 0.03, 0.1],
    "SGD, no norm": [0.03, 0.1, 0.3, 1.0],
}

Data = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Trial:
    """One training run: errors in %, losses in nats."""

    setting: str
    variant: str
    learning_rate: float
    seed: int
    validation_error: float
    test_error: float
    head_losses: list[float]  # the single heads' mean training loss in each epoch; shorter if it diverged


def load(train: int, validation: int = 1000, test: int = 5000) -> Data:
    total = train + validation + test
    data = make_dataset(ObjectView(dict(vars(get_dataset_args()), num_samples=total, train_split=train / total)))
    x, y = torch.tensor(data["x_test"]).float().unsqueeze(1), torch.tensor(data["y_test"])
    return {
        "train": (torch.tensor(data["x"]).float().unsqueeze(1), torch.tensor(data["y"])),
        "validation": (x[:validation], y[:validation]),
        "test": (x[validation:], y[validation:]),
    }


def build(variant: str, setting: str) -> EnsembleNet:
    def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        convolution = nn.Conv1d(inputs, outputs, 3, stride, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        norm = nn.BatchNorm1d(outputs) if "batch norm" in setting else nn.Identity()
        return nn.Sequential(convolution, norm, nn.ReLU())

    def head(width: int) -> nn.Sequential:
        pool = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 10)]
        return nn.Sequential(block(24, width, stride=2), block(width, width), *pool)

    trunk = nn.Sequential(block(1, 24, stride=2), block(24, 24, stride=2))
    if variant == "base":
        return EnsembleNet(trunk, [head(64)])
    heads = [head(26) for _ in range(1 if variant == "alone" else NUM_HEADS)]
    return EnsembleNet(trunk, heads, balance_gradients=variant == "balanced")


def loss_of(model: EnsembleNet, variant: str, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """The loss to descend, and the mean loss of the single heads."""
    outputs = model(x)
    loss = codistillation(outputs, y, WEIGHT) * (model.num_heads if variant == "sum" else 1)
    return loss, codistillation(outputs.detach(), y, weight=1.0).item()


def optimizer_of(setting: str, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    if setting.startswith("SGD"):
        return torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, weight_decay=5e-4)
    return torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)


def train(setting: str, variant: str, learning_rate: float, seed: int, data: Data, epochs: int) -> Trial:
    torch.manual_seed(seed)
    model = build(variant, setting)
    x, y = data["train"]
    steps = len(x) // BATCH
    optimizer = optimizer_of(setting, model, learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    head_losses = []
    for _ in range(epochs):
        model.train()
        total = 0.0
        for rows in torch.randperm(len(x))[: steps * BATCH].split(BATCH):
            loss, head_loss = loss_of(model, variant, x[rows], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += head_loss / steps
        if not math.isfinite(total):
            break
        head_losses.append(total)
    errors = {split: error(model, *data[split]) for split in ("validation", "test")}
    return Trial(setting, variant, learning_rate, seed, errors["validation"], errors["test"], head_losses)


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * (model.eval()(x).argmax(1) != y).float().mean().item()


def first_gradients(setting: str, variant: str, seed: int, data: Data) -> tuple[float, float]:
    """The gradient's norm in the first head and in the trunk, at initialisation."""
    torch.manual_seed(seed)  # the first head and the trunk then start the same in all variants but the base
    model = build(variant, setting)
    loss_of(model, variant, *data["train"])[0].backward()
    return gradient_norm(model.heads[0]), gradient_norm(model.trunk)


def gradient_norm(module: nn.Module) -> float:
    return math.hypot(*(p.grad.norm().item() for p in module.parameters() if p.grad is not None))


def best_learning_rate(trials: Iterable[Trial]) -> float:
    trials = list(trials)
    rates = sorted({t.learning_rate for t in trials})
    return min(rates, key=lambda rate: mean(t.validation_error for t in trials if t.learning_rate == rate))


def summarize(setting: str, trials: list[Trial], seeds: range, data: Data) -> list[dict[str, object]]:
    trials = [t for t in trials if t.setting == setting]
    base_rate = best_learning_rate(t for t in trials if t.variant == "base")
    gradient = {v: [first_gradients(setting, v, s, data) for s in seeds] for v in [*VARIANTS, "alone"]}
    rows = []
    for variant in [*VARIANTS, "alone"]:
        own = [t for t in trials if t.variant == variant]
        rate = best_learning_rate(own)
        at_own_rate = [t.test_error for t in own if t.learning_rate == rate]
        at_base_rate = [t for t in own if t.learning_rate == base_rate]
        early = [t.head_losses[EARLY - 1] for t in at_base_rate if len(t.head_losses) >= EARLY]
        head, trunk = (
            mean(g[part] / alone[part] for g, alone in zip(gradient[variant], gradient["alone"], strict=True))
            for part in (0, 1)
        )
        rows.append(
            {
                "setting": setting,
                "method": variant,
                "learning_rate": None if variant == "alone" else rate,
                "error_mean": None if variant == "alone" else mean(at_own_rate),
                "error_std": None if variant == "alone" else stdev(at_own_rate),
                "base_learning_rate": base_rate,
                "error_mean_at_base_rate": mean(t.test_error for t in at_base_rate),
                "error_std_at_base_rate": stdev(t.test_error for t in at_base_rate),
                "early_head_loss": mean(early) if early else None,
                "head_gradient": head,
                "trunk_gradient": trunk,
            }
        )
    return rows


def table_of(rows: list[dict[str, object]]) -> Table:
    def number(row: dict[str, object], key: str, digits: int) -> str:
        return "-" if row[key] is None else f"{row[key]:.{digits}f}"

    def spread(row: dict[str, object], mean_key: str, std_key: str) -> str:
        return "-" if row[mean_key] is None else f"{row[mean_key]:.2f} ± {row[std_key]:.2f}"

    table = Table(title="MNIST-1D, test error in %, mean ± standard deviation over seeds")
    for column in ["setting", "method", "gradient in a head", "gradient in the trunk"]:
        table.add_column(column)
    table.add_column(f"head loss, epoch {EARLY}")
    table.add_column("error, base's rate")
    table.add_column("error, own rate")
    table.add_column("own rate")
    for row in rows:
        table.add_row(
            str(row["setting"]),
            str(row["method"]),
            number(row, "head_gradient", 2),
            number(row, "trunk_gradient", 2),
            number(row, "early_head_loss", 3),
            spread(row, "error_mean_at_base_rate", "error_std_at_base_rate"),
            spread(row, "error_mean", "error_std"),
            number(row, "learning_rate", 3),
            end_section=row["method"] == "alone",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="training runs of each kind, at least 2 (default: 3)")
    parser.add_argument("--epochs", type=int, default=16, help="epochs of a run (default: 16)")
    parser.add_argument("--examples", type=int, default=2000, help="training examples (default: 2000)")
    parser.add_argument("--setting", choices=SETTINGS, help="run only this one (default: all)")
    default_output = Path(__file__).parent / "results" / "gradient_scale.json"
    parser.add_argument("--output", type=Path, default=default_output, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)

    data = load(options.examples)
    seeds = range(options.seeds)
    run = partial(train, data=data, epochs=options.epochs)
    settings = [options.setting] if options.setting else list(SETTINGS)
    jobs = [(s, v, r, seed) for s in settings for v in VARIANTS for r in SETTINGS[s] for seed in seeds]
    trials = [run(*job) for job in track(jobs, "training")]
    for setting in settings:
        rate = best_learning_rate(t for t in trials if t.setting == setting and t.variant == "base")
        trials += [run(setting, "alone", rate, seed) for seed in seeds]
    rows = [row for setting in settings for row in summarize(setting, trials, seeds, data)]

    result = {
        "command": shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "data": {split: len(y) for split, (_, y) in data.items()},
        "seeds": list(seeds),
        "epochs": options.epochs,
        "batch": BATCH,
        "weight": WEIGHT,
        "parameters": {v: count_parameters(build(v, "batch norm")) for v in ["base", "balanced", "alone"]},
        "cpu_minutes": round(time.process_time() / 60, 1),
        "rows": rows,
        "trials": [asdict(trial) for trial in trials],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    Console(width=max(120, Console().width)).print(table_of(rows))


if __name__ == "__main__":
    main()
